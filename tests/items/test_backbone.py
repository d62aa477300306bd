import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, LlamaModel, T5Config, T5EncoderModel

from hllm.config import Dtype, LLMConfig
from hllm.errors import ConfigError, LLMError
from hllm.items.backbone import choose_device, choose_dtype, load_backbone
from hllm.items.files import LLMFiles

Config = Callable[..., LLMConfig]
IDS = torch.tensor([[5, 9, 12, 40]])


@pytest.mark.parametrize(
    ("flag", "device", "fast", "expected"),
    [
        (Dtype.auto, "cpu", True, torch.bfloat16),
        (Dtype.auto, "cpu", False, torch.float32),
        (Dtype.auto, "cuda", True, torch.bfloat16),
        (Dtype.auto, "cuda", False, torch.float16),
        (Dtype.float32, "cuda", True, torch.float32),
        (Dtype.float16, "cpu", False, torch.float16),
    ],
)
def test_dtype_is_16_bits_where_fast(flag: Dtype, device: str, fast: bool, expected: torch.dtype) -> None:
    assert choose_dtype(flag, torch.device(device), fast) == expected


@pytest.mark.parametrize("flag", ["gpu", "mps", "cuda:99"])
def test_unknown_device_names_the_flag(flag: str) -> None:
    with pytest.raises(ConfigError, match=rf"llm\.device={flag}"):
        choose_device(flag)


def test_model_is_the_body_and_loading_leaves_the_random_state(tiny_llama: Path, llm_config: Config) -> None:
    state = torch.get_rng_state()
    backbone = load_backbone(LLMFiles("tiny", tiny_llama), llm_config(tiny_llama))
    assert torch.equal(state, torch.get_rng_state())
    assert isinstance(backbone.model, LlamaModel)
    assert not backbone.model.training
    assert (backbone.dim, backbone.dtype) == (32, torch.float32)


def test_encoder_decoder_is_refused(tmp_path: Path, llm_config: Config) -> None:
    config = T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, is_encoder_decoder=True)
    T5EncoderModel(config).save_pretrained(tmp_path)
    _edit(tmp_path, is_encoder_decoder=True)
    with pytest.raises(LLMError, match="t5 is an encoder-decoder"):
        load_backbone(LLMFiles("tiny", tmp_path), llm_config(tmp_path))


def test_model_with_its_own_code_is_refused_and_not_run(
    save_llama: Callable[..., Path], tmp_path: Path, llm_config: Config
) -> None:
    folder = save_llama(tmp_path / "llm")
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    _edit(folder, model_type="own", auto_map={"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel"})
    with pytest.raises(LLMError, match="cannot be loaded"):
        load_backbone(LLMFiles("tiny", folder), llm_config(folder))
    assert not (tmp_path / "ran").exists()


def test_missing_weights_are_not_made_up(save_llama: Callable[..., Path], tmp_path: Path, llm_config: Config) -> None:
    folder = save_llama(tmp_path / "llm")
    _edit(folder, num_hidden_layers=3)
    with pytest.raises(LLMError, match=r"weights lack layers\.2\."):
        load_backbone(LLMFiles("tiny", folder), llm_config(folder))


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_baichuan_layout_is_read_as_the_llama_it_is(
    save_llama: Callable[..., Path], tmp_path: Path, llm_config: Config, form: str
) -> None:
    folder = save_llama(tmp_path / "llm")
    reference = AutoModel.from_pretrained(folder).eval()
    to_baichuan(folder, form)
    backbone = load_backbone(LLMFiles("tiny", folder), llm_config(folder))
    with torch.no_grad():
        expected, got = (model(input_ids=IDS).last_hidden_state for model in (reference, backbone.model))
    torch.testing.assert_close(got, expected, atol=0, rtol=0)
    assert backbone.tokenizer("word1 word2")["input_ids"] == [11, 12]


def test_baichuan_with_other_positions_is_refused(
    save_llama: Callable[..., Path], tmp_path: Path, llm_config: Config
) -> None:
    folder = save_llama(tmp_path / "llm")
    to_baichuan(folder, "safetensors")
    _edit(folder, max_position_embeddings=None)
    with pytest.raises(LLMError, match="not the 13B"):
        load_backbone(LLMFiles("tiny", folder), llm_config(folder))


def test_baichuan_without_a_shard_is_refused(
    save_llama: Callable[..., Path], tmp_path: Path, llm_config: Config
) -> None:
    folder = save_llama(tmp_path / "llm")
    to_baichuan(folder, "bin")
    (folder / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(LLMError, match="the weights lack"):
        load_backbone(LLMFiles("tiny", folder), llm_config(folder))


def _edit(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    settings = {key: value for key, value in (json.loads(path.read_text()) | changes).items() if value is not None}
    path.write_text(json.dumps(settings))


def to_baichuan(folder: Path, form: str) -> None:
    """Rewrite a Llama folder in Baichuan2's layout: fused W_pack, a head, an auto_map, two weight files."""
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    fused = {}
    for name, tensor in weights.items():
        if "q_proj" in name:
            parts = [weights[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")]
            fused["model." + name.replace("q_proj", "W_pack")] = torch.cat(parts)
        elif "k_proj" not in name and "v_proj" not in name:
            fused["model." + name] = tensor
    fused["lm_head.weight"] = torch.randn(64, 32)
    names = sorted(fused)
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        shard = {name: fused[name].clone() for name in part}
        stem = f"{number:05d}-of-00002"
        if form == "bin":
            torch.save(shard, folder / f"pytorch_model-{stem}.bin")
        else:
            save_file(shard, folder / f"model-{stem}.safetensors")
    _edit(folder, model_type="baichuan", auto_map={"AutoModel": "modeling_baichuan.BaichuanModel"})
