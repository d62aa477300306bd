"""Item vectors: transforms fitted on the catalogue, new items, and what a checkpoint holds."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hllm.config import Adaptor, CachedItemsConfig, FusedItemsConfig, IdItemsConfig, TargetSide, Transform
from hllm.errors import ConfigError
from hllm.items.store import ItemTable
from hllm.items.tower import CachedItems, FusedItems, IdItems, fit_transform, mean_cosine

ITEMS, WIDTH = 200, 6


@pytest.fixture
def vectors() -> Tensor:
    """Correlated, of unequal variances, all pointing much the same way."""
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(ITEMS, WIDTH, generator=generator) @ torch.randn(WIDTH, WIDTH, generator=generator)
    return mixed * torch.linspace(0.1, 3, WIDTH) + 20


def table(vectors: Tensor, fingerprint: str = "f") -> ItemTable:
    return ItemTable([str(row) for row in range(len(vectors))], vectors, fingerprint)


def tower(vectors: Tensor, **changes: Any) -> CachedItems:
    torch.manual_seed(0)
    items = CachedItems(CachedItemsConfig(name="cached", **changes), dim=4)
    items.attach(table(vectors))
    return items.eval()


COLD = 3


def fused(vectors: Tensor, **changes: Any) -> FusedItems:
    """Item 3 was not in training."""
    torch.manual_seed(0)
    counts = torch.full((ITEMS + 1,), 5)
    counts[[0, COLD]] = 0
    items = FusedItems(FusedItemsConfig(name="fused", **changes), 4, counts)
    items.attach(table(vectors))
    return items.eval()


def test_whitening_gives_uncorrelated_dimensions_of_variance_one(vectors: Tensor) -> None:
    mean, matrix = fit_transform(vectors, Transform.whiten, epsilon=1e-9)
    white = (vectors - mean) @ matrix
    torch.testing.assert_close(white.T @ white / ITEMS, torch.eye(WIDTH), atol=1e-3, rtol=0)
    torch.testing.assert_close(white.mean(0), torch.zeros(WIDTH), atol=1e-4, rtol=0)


def test_whitening_keeps_directions(vectors: Tensor) -> None:
    """ZCA: of all whitening maps the symmetric one, closest to leaving the vectors alone."""
    _, matrix = fit_transform(vectors, Transform.whiten, epsilon=0.01)
    torch.testing.assert_close(matrix, matrix.T, atol=1e-5, rtol=1e-5)
    assert (torch.linalg.eigvalsh(matrix) > 0).all()


def test_epsilon_holds_back_directions_without_variance(vectors: Tensor) -> None:
    flat = vectors.clone()
    flat[:, 0] = 5
    mean, matrix = fit_transform(flat, Transform.whiten, epsilon=0.01)
    white = (flat - mean) @ matrix
    assert white.isfinite().all()
    assert white[:, 0].abs().max() < 0.1


def test_centring_takes_the_mean_off_and_scales_evenly(vectors: Tensor) -> None:
    mean, matrix = fit_transform(vectors, Transform.center, epsilon=0.01)
    centred = vectors - vectors.mean(0)
    torch.testing.assert_close((vectors - mean) @ matrix, centred / centred.square().mean().sqrt())


def test_without_a_transform_vectors_are_only_scaled(vectors: Tensor) -> None:
    mean, matrix = fit_transform(vectors, Transform.none, epsilon=0.01)
    torch.testing.assert_close((vectors - mean) @ matrix, vectors / vectors.square().mean().sqrt())


@pytest.mark.parametrize("kind", Transform)
def test_a_catalogue_of_equal_vectors_gives_no_nan(kind: Transform) -> None:
    mean, matrix = fit_transform(torch.full((5, WIDTH), 2.0), kind, epsilon=0.01)
    assert ((torch.full((5, WIDTH), 2.0) - mean) @ matrix).isfinite().all()


def test_mean_cosine_equals_the_mean_over_all_pairs(vectors: Tensor) -> None:
    pairs = F.cosine_similarity(vectors[:, None], vectors[None], dim=-1)
    expected = pairs[~torch.eye(ITEMS, dtype=torch.bool)].mean().item()
    assert mean_cosine(vectors) == pytest.approx(expected, abs=1e-5)


def test_whitening_tells_items_apart(vectors: Tensor) -> None:
    statistics = tower(vectors).statistics
    assert statistics["mean_cosine_raw"] > 0.9
    assert abs(statistics["mean_cosine"]) < 0.05


@pytest.mark.parametrize("adaptor", [Adaptor.linear, Adaptor.mlp])
def test_vectors_come_for_the_asked_ids_in_their_order(vectors: Tensor, adaptor: Adaptor) -> None:
    items = tower(vectors, adaptor=adaptor)
    ids = torch.tensor([7, 1, ITEMS])
    torch.testing.assert_close(items(ids), items.all()[ids - 1])
    assert items.all().shape == (ITEMS, 4)


def test_without_transform_and_adaptor_vectors_are_the_stored_ones(vectors: Tensor) -> None:
    items = CachedItems(CachedItemsConfig(name="cached", transform=Transform.raw, adaptor=Adaptor.none), dim=WIDTH)
    items.attach(table(vectors))
    assert torch.equal(items.all(), vectors)
    assert not list(items.parameters())


def test_without_adaptor_the_widths_must_be_equal(vectors: Tensor) -> None:
    with pytest.raises(ConfigError, match=f"items.adaptor=none: the vectors are {WIDTH} wide, the user model 4;"):
        tower(vectors, adaptor=Adaptor.none)


def test_ids_in_another_width_are_mapped(vectors: Tensor) -> None:
    items = IdItems(IdItemsConfig(name="id", dim=8), num_items=ITEMS, dim=4)
    assert items.table.weight.shape == (ITEMS + 1, 8)
    torch.testing.assert_close(items.all(), items.table.weight[1:] @ items.projector.weight.T)


def test_a_linear_adaptor_is_one_affine_map(vectors: Tensor) -> None:
    items = tower(vectors, transform=Transform.none)
    linear = items.adaptor[-1]
    scaled = vectors / vectors.square().mean().sqrt()
    torch.testing.assert_close(items.all(), scaled @ linear.weight.T + linear.bias, atol=1e-4, rtol=1e-4)


def test_the_vectors_are_not_trained(vectors: Tensor) -> None:
    trained = {name.split(".")[0] for name, _ in tower(vectors).named_parameters()}
    assert trained == {"adaptor"}


def test_the_checkpoint_holds_what_was_fitted_but_no_item(vectors: Tensor) -> None:
    state = tower(vectors).state_dict()
    assert {"mean", "whitening"} < set(state)
    assert all(ITEMS not in value.shape for value in state.values())


@pytest.mark.parametrize("neighbours", [0, 2])
def test_a_loaded_tower_gives_the_same_vectors(vectors: Tensor, neighbours: int) -> None:
    trained = tower(vectors, neighbours=neighbours)
    other = CachedItems(CachedItemsConfig(name="cached", neighbours=neighbours), dim=4)
    other.attach(table(vectors * 2 + 1))  # fits another transform, which the checkpoint's replaces
    other.attach(table(vectors))
    assert not torch.allclose(other.eval().all(), trained.all())
    other.load_state_dict(trained.state_dict())
    assert torch.equal(other.all(), trained.all())


@pytest.mark.parametrize("neighbours", [0, 2])
def test_new_items_leave_the_old_items_vectors_as_they_were(vectors: Tensor, neighbours: int) -> None:
    items = tower(vectors, neighbours=neighbours)
    before = items.all()
    items.attach(table(torch.cat([vectors, torch.randn(3, WIDTH) * 50]), "g"))
    assert items.num_items == ITEMS + 3
    assert items.all().shape == (ITEMS + 3, 4 + neighbours)
    torch.testing.assert_close(items.all()[:ITEMS], before)


def test_half_precision_vectors_are_mapped_in_float32(vectors: Tensor) -> None:
    items = tower(vectors.bfloat16())
    assert items.vectors.dtype == torch.float32
    torch.testing.assert_close(items.vectors.mean(0), torch.zeros(WIDTH), atol=1e-4, rtol=0)


def test_loading_before_a_table_is_attached_is_a_defect_that_shows(vectors: Tensor) -> None:
    with pytest.raises(AssertionError, match="attach a table before"):
        CachedItems(CachedItemsConfig(name="cached"), dim=4).load_state_dict({}, strict=False)


def test_id_vectors_are_learned_rows() -> None:
    items = IdItems(IdItemsConfig(name="id"), num_items=9, dim=4)
    items(torch.tensor([2, 9])).sum().backward()
    assert items.table.weight.grad is not None
    assert items.table.weight.grad.any(dim=1).nonzero().flatten().tolist() == [2, 9]
    assert torch.equal(items.all(), items.table.weight[1:])


def test_item_dropout_acts_in_training_only(vectors: Tensor) -> None:
    items = tower(vectors, dropout=0.5)
    assert torch.equal(items.all(), items.all())
    items.train()
    assert not torch.equal(items.all(), items.all())


@pytest.mark.parametrize("target", TargetSide)
def test_fused_vectors_are_text_and_id_summed(vectors: Tensor, target: TargetSide) -> None:
    """Table 12: the sum goes into the user model; the target is the text's vector, or the sum too."""
    items, ids = fused(vectors, target=target), torch.tensor([7, 1, ITEMS])
    text = items.adaptor(items.vectors[ids - 1])
    read, scored = items.sides(ids)
    torch.testing.assert_close(read, text + items.id_table.weight[ids])
    torch.testing.assert_close(scored, text if target is TargetSide.text else read)
    for side, whole in zip((read, scored), items.catalogue(), strict=True):
        torch.testing.assert_close(side, whole[ids - 1])


def test_anchors_of_unit_length_stand_behind_the_vectors(vectors: Tensor) -> None:
    alone, items, ids = fused(vectors), fused(vectors, neighbours=3), torch.tensor([7, 1, ITEMS])
    torch.testing.assert_close(items(ids)[:, :4], alone(ids))
    torch.testing.assert_close(items(ids)[:, 4:].norm(dim=1), torch.ones(3))
    assert items.anchors.requires_grad is False


def test_more_neighbours_than_the_vectors_are_wide_are_refused(vectors: Tensor) -> None:
    with pytest.raises(ConfigError, match=f"items.neighbours={WIDTH + 1}: the vectors are {WIDTH} wide"):
        tower(vectors, neighbours=WIDTH + 1)


def test_a_cold_item_is_its_text_and_its_id_vector_is_not_trained(vectors: Tensor) -> None:
    items, ids = fused(vectors).train(), torch.tensor([COLD, 5])
    torch.testing.assert_close(items(ids)[0], items.adaptor(items.vectors[ids - 1])[0])
    items(ids).sum().backward()
    assert items.id_table.weight.grad is not None
    assert items.id_table.weight.grad.any(dim=1).nonzero().flatten().tolist() == [5]


def test_new_items_of_a_fused_tower_are_their_texts(vectors: Tensor) -> None:
    items = fused(vectors)
    before = items.all()
    items.attach(table(torch.cat([vectors, vectors[:2] + 1]), "g"))
    torch.testing.assert_close(items.all()[:ITEMS], before)
    torch.testing.assert_close(items.all()[ITEMS:], items.adaptor(items.vectors[ITEMS:]))


def test_id_dropout_leaves_out_its_share_of_id_vectors_on_both_sides_in_training_only(vectors: Tensor) -> None:
    items = fused(vectors, id_dropout=0.25, adaptor=Adaptor.linear).train()
    ids = torch.arange(1, ITEMS + 1)
    text = items.adaptor(items.vectors)
    left_out = torch.stack([(items.sides(ids)[0] == text).all(1) for _ in range(50)]).float()
    assert left_out[:, COLD - 1].all()
    assert left_out.mean().item() == pytest.approx(0.25, abs=0.02)
    assert 0 < left_out[:, 0].sum() < 50
    read, scored = items.sides(ids)
    assert torch.equal(read, scored)
    assert (items.eval().all() == text).all(1).nonzero().flatten().tolist() == [COLD - 1]
