"""Item embedding: ours beside one text at a time, and beside padded batches as libraries make them.

    python scripts/bench/embed.py --record
    python scripts/bench/embed.py --data movielens_1m --items 0 --rounds 0 --record
    python scripts/bench/embed.py --llm tinyllama_1.1b --items 20000 --token-budget 16384        # a GPU

All ways embed the same item texts, to the last token's hidden state; loading is not counted. ``one by one`` is the
light form's original (torch-rechub, preprocess_hllm_data.py): float32, the vocabulary head and all hidden states
computed, one text a forward pass. ``padded`` is a transformers body on batches of 32 in the given order, tokenised in
each batch, in our dtype. ``sentence-transformers`` is its encode, where it is installed: sorted by length, batches of
32, our dtype. The largest cosine distance to the first way's vectors stands beside each. ``of peak``: the FLOPs that
the texts need, without padding or head, of the last layer what is read, over what the device's large products reach in
that dtype; ours may pass what is possible without a shared prefix.
"""

import argparse
import importlib.util
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))
from measure import Table, finish, forward_flops, in_turns, of_peak, parser

from hllm.build import build_datamodule
from hllm.config import Dtype, compose
from hllm.items.backbone import Backbone, load_backbone
from hllm.items.encoder import Encoder
from hllm.items.files import LLMFiles, locate
from hllm.items.text import item_texts

BATCH = 32


def main() -> None:
    flags = parser(__doc__, rounds=3)
    flags.add_argument("--llm", default="smollm2_135m", help="a decoder of conf/llm (default: %(default)s)")
    flags.add_argument("--items", type=int, default=200, help="texts, drawn at random; 0 is all (default: %(default)s)")
    flags.add_argument("--data", default="movielens_100k", help="whose (default: %(default)s)")
    flags.add_argument("--dataset-root", help="folder of its raw files, where they are here already")
    flags.add_argument(
        "--dtype", default="auto", choices=[dtype.value for dtype in Dtype], help="of all but one by one"
    )
    args = flags.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        table = measure(args, Path(folder))
    print(f"{table.title}\n\n{table.text()}\n", flush=True)
    finish("embed", args, [table])


def measure(args: argparse.Namespace, folder: Path) -> Table:
    overrides = [f"dataset={args.data}", f"llm={args.llm}", f"llm.device={args.device}", f"llm.dtype={args.dtype}"]
    config = compose(overrides + ([f"dataset.root={args.dataset_root}"] if args.dataset_root else []))
    cache_dir = Path(config.cache_dir).expanduser()
    data = build_datamodule(config)
    data.setup()
    texts = item_texts(data.catalog, config.dataset.text)
    drawn = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0))[: args.items or None]
    texts = [texts[row] for row in drawn.tolist()]
    files = locate(config.llm, cache_dir)
    backbone = load_backbone(files, config.llm)
    original = load_original(files).to(backbone.device)

    def ours(save_work: bool) -> Callable[[], Tensor]:
        def turn() -> Tensor:
            encoder = Encoder(backbone, replace(config.llm, save_work=save_work), texts, texts)
            order = encoder.order()
            vectors = torch.empty(len(texts), backbone.dim)
            vectors[order] = encoder.encode(order).float()
            return vectors

        return turn

    batches = [texts[begin : begin + BATCH] for begin in range(0, len(texts), BATCH)]
    ways: dict[str, Callable[[], Tensor]] = {
        "one by one": lambda: torch.stack([embed_one(original, backbone, text) for text in texts]),
        "padded": lambda: torch.cat([embed_batch(backbone, batch) for batch in batches]),
    }
    if importlib.util.find_spec("sentence_transformers"):
        ways["sentence-transformers"] = sentence_transformers(backbone, texts, folder)
    ways |= {"ours, prefix not shared, all of the last layer": ours(False), "ours": ours(True)}
    found: dict[str, Tensor] = {}

    def kept(way: str) -> Callable[[], None]:
        return lambda: found.update({way: ways[way]()})

    seconds, megabytes = in_turns({way: kept(way) for way in ways}, args)
    furthest = {way: (1 - F.cosine_similarity(own, found["one by one"])).max().item() for way, own in found.items()}
    assert max(furthest.values()) < 0.01, f"not the same vectors: {furthest}"
    distances = {way: f"{distance:.5f}" for way, distance in furthest.items()}
    lengths = Encoder(backbone, config.llm, texts, texts).tokens.lengths
    needed = forward_flops(backbone.model, [(1, int(tokens)) for tokens in lengths], read_last=True)
    flops = {way: (needed, torch.float32 if way == "one by one" else backbone.dtype) for way in ways}
    medians = {way: median(turns) for way, turns in seconds.items()}
    cells = {
        "tokens/s": {way: f"{lengths.sum() / taken:,.0f}" for way, taken in medians.items()},
        "of peak": of_peak(seconds, flops, args),
        "cosine distance": distances,
    }
    about = f"{len(texts)} texts of {args.data}, {lengths.mean():.1f} tokens each"
    title = f"{backbone.name}, {about}, {str(backbone.dtype)[6:]}"
    return Table(title, "items", len(texts), seconds, megabytes, cells)


def load_original(files: LLMFiles) -> Any:
    options: dict[str, Any] = {"gguf_file": files.gguf_file} if files.gguf_file else {}
    if files.gguf_file and hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    return transformers.AutoModelForCausalLM.from_pretrained(files.folder, dtype=torch.float32, **options).eval()


@torch.no_grad()
def embed_one(model: Any, backbone: Backbone, text: str) -> Tensor:
    output = model(**backbone.tokenizer(text, return_tensors="pt").to(backbone.device), output_hidden_states=True)
    vector: Tensor = output.hidden_states[-1][0, -1].cpu()
    return vector


@torch.no_grad()
def embed_batch(backbone: Backbone, texts: list[str]) -> Tensor:
    tokenizer = backbone.tokenizer
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right").to(backbone.device)
    hidden = backbone.model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).last_hidden_state
    return hidden[torch.arange(len(texts)), inputs["attention_mask"].sum(1) - 1].float().cpu()


def sentence_transformers(backbone: Backbone, texts: list[str], folder: Path) -> Callable[[], Tensor]:
    """Its encode around the very weights and tokenizer that ours runs."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    backbone.model.save_pretrained(folder)
    backbone.tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)  # else each text is wrapped as a conversation
    body = Transformer(str(folder), model_kwargs={"dtype": backbone.dtype})
    model = SentenceTransformer(modules=[body, Pooling(backbone.dim, "lasttoken")], device=str(backbone.device))
    return lambda: model.encode(texts, batch_size=BATCH, convert_to_tensor=True, show_progress_bar=False).float().cpu()


if __name__ == "__main__":
    main()
