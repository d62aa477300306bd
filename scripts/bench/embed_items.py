"""Speed of item embedding against the one-text-at-a-time loop of the light form's original.

    python scripts/bench/embed_items.py --items 200

Both embed the same random MovieLens-100k item texts with the same model, in turns within one run; loading is not
counted. The loop: AutoModelForCausalLM in float32 with all hidden states, one text a forward pass, the last token of
the last layer (torch-rechub, preprocess_hllm_data.py).
"""

import argparse
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers

from hllm.config import Dtype, compose
from hllm.data.movielens import MovieLens100K
from hllm.items.backbone import load_backbone
from hllm.items.encoder import Encoder
from hllm.items.files import LLMFiles, locate
from hllm.items.text import item_texts


def main() -> None:
    args = parse_args()
    config = compose([f"llm={args.llm}"])
    cache_dir = Path(config.cache_dir).expanduser()
    data = MovieLens100K(config.dataset, cache_dir)
    data.setup()
    texts = item_texts(data.catalog, config.dataset.text)
    generator = torch.Generator().manual_seed(args.seed)
    texts = [texts[row] for row in torch.randperm(len(texts), generator=generator)[: args.items].tolist()]
    files = locate(config.llm, cache_dir)
    config.llm.dtype = Dtype(args.dtype)
    backbone = load_backbone(files, config.llm)
    original, tokenizer = load_original(files)

    def ours() -> torch.Tensor:
        encoder = Encoder(backbone, config.llm, texts, texts)
        order = encoder.order()
        vectors = torch.empty(len(texts), backbone.dim)
        vectors[order] = encoder.encode(order).float()
        return vectors

    def theirs() -> torch.Tensor:
        return torch.stack([embed_one(original, tokenizer, text) for text in texts])

    print(f"{hardware()}; torch {torch.__version__}, transformers {transformers.__version__}")
    print(f"{backbone.name}, {len(texts)} item texts, ours in {backbone.dtype} on {backbone.device}")
    measure(ours, theirs, len(texts), args.rounds)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llm", default="smollm2_135m", help="a decoder of conf/llm (default: %(default)s)")
    parser.add_argument("--items", type=int, default=200, help="item texts, drawn at random (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=2, help="turns of each path (default: %(default)s)")
    parser.add_argument("--dtype", default="auto", choices=[dtype.value for dtype in Dtype], help="ours only")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def load_original(files: LLMFiles) -> tuple[Any, Any]:
    options: dict[str, Any] = {"gguf_file": files.gguf_file} if files.gguf_file else {}
    tokenizer = transformers.AutoTokenizer.from_pretrained(files.folder, **options)
    if files.gguf_file and hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(files.folder, dtype=torch.float32, **options)
    return model.eval(), tokenizer


@torch.no_grad()
def embed_one(model: Any, tokenizer: Any, text: str) -> torch.Tensor:
    inputs = tokenizer(text, return_tensors="pt")
    output = model(**inputs, output_hidden_states=True)
    vector: torch.Tensor = output.hidden_states[-1][0, -1]
    return vector


def measure(ours: Callable[[], torch.Tensor], theirs: Callable[[], torch.Tensor], num_items: int, rounds: int) -> None:
    """Run both in turns; print each round, the ratio of the summed times, and how far the vectors are apart."""
    seconds = {"ours": 0.0, "one by one": 0.0}
    tables = {}
    for _ in range(rounds):
        for name, path in (("ours", ours), ("one by one", theirs)):
            started = time.perf_counter()
            tables[name] = path()
            elapsed = time.perf_counter() - started
            seconds[name] += elapsed
            print(f"{name:>10}: {num_items / elapsed:6.1f} items/s")
    distance = 1 - F.cosine_similarity(tables["ours"], tables["one by one"])
    print(f"ratio {seconds['one by one'] / seconds['ours']:.2f}x; largest cosine distance {distance.max():.5f}")


def hardware() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads"


if __name__ == "__main__":
    main()
