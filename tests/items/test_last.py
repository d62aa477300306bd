"""The spared feed-forward changes nothing that is read."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModel

from hllm.items.last import LastFeedForward


@pytest.mark.parametrize("packed", [False, True])
def test_states_and_gradients_at_the_places_are_those_of_the_whole(tiny_llama: Path, packed: bool) -> None:
    model = AutoModel.from_pretrained(tiny_llama, dtype=torch.float64)  # its gradients span six orders
    ids = torch.randint(0, 60, (1 if packed else 3, 7), generator=torch.Generator().manual_seed(0))
    places = (
        (torch.zeros(2, dtype=torch.long), torch.tensor([2, 6]))
        if packed
        else (torch.arange(3), torch.tensor([6, 2, 4]))
    )

    def run() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        model.zero_grad()
        hidden = model(input_ids=ids).last_hidden_state
        hidden[places].square().sum().backward()
        return hidden.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    whole, gradients = run()
    last = LastFeedForward(model)
    sizes: list[torch.Size] = []
    model.layers[-1].mlp.down_proj.register_forward_hook(lambda module, args, output: sizes.append(output.shape))
    with last.only(*places):
        spared, found = run()
    torch.testing.assert_close(spared[places], whole[places], atol=1e-6, rtol=0)
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-5)
    assert sizes == [torch.Size([len(places[0]), 32])], "the feed-forward ran at the places only"
    torch.testing.assert_close(run()[0], whole, atol=1e-6, rtol=0)  # outside of ``only`` it is the model it was
