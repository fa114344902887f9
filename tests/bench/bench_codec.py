"""The lossless codec of features, beside what libraries offer: size, and decoding speed on one core.

Data: pooled features of EfficientNet-Lite0 (ImageNet weights) at regions of the demo's pictures, as they are and behind
the ReLU6 that precedes their pooling; and half-normal numbers with exact zeros, as pooled detector features have them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zstandard
from PIL import Image

from data_tools import demo_corpus
from vlscale.data.codec import decode_into, encode
from vlscale.errors import VlscaleError

RUNS = 7
Coder = tuple[Callable[[Any], Any], Callable[[Any, Any], None]]


def half_normal(zeros: float, dtype: str = "float16", images: int = 16) -> list[np.ndarray]:
    """Images of 36 x 2048."""
    rng = np.random.default_rng(0)
    found = np.abs(rng.standard_normal((images, 36, 2048))).astype(dtype)
    found[rng.random(found.shape) < zeros] = 0
    return list(found)


def real_features(pictures: int = 24, regions: int = 36) -> dict[str, list[np.ndarray]]:
    """float16 [36, 1280] of the demo's pictures: mean-pooled regions, and single cells of the map behind its ReLU6.

    Empty where the network's wheel is not installed.
    """
    try:
        from data_tools.lite0 import normalise
        from data_tools.region_features import RegionExtractor

        extractor = RegionExtractor()
    except (ImportError, VlscaleError):
        return {}
    rng = np.random.default_rng(0)
    found: dict[str, list[np.ndarray]] = {"real, pooled regions": [], "real, cells of a map": []}
    files = sorted((Path(demo_corpus.__file__).parent / "demo" / "images").glob("*.webp"))[:pictures]
    for file in files:
        pixels = np.array(Image.open(file).convert("RGB").resize((256, 256)))
        corners = rng.uniform(0, 160, (regions, 2))
        boxes = np.concatenate([corners, corners + rng.uniform(32, 96, (regions, 2))], 1).astype(np.float32)
        found["real, pooled regions"].append(extractor(pixels, boxes).features.astype(np.float16))
        with torch.inference_mode():
            cells = extractor._network.feature_map(normalise(torch.from_numpy(pixels)[None]))
        found["real, cells of a map"].append(
            np.ascontiguousarray(cells[0].flatten(1).T.numpy()[:regions].astype(np.float16))
        )
    return found


def shuffled_zstd() -> Coder:
    """Bytes of one significance together, then zstd: what HDF5 filters and Blosc do."""
    compressor, decompressor = zstandard.ZstdCompressor(level=1), zstandard.ZstdDecompressor()

    def coded(features: Any) -> bytes:
        return compressor.compress(np.ascontiguousarray(features.view(np.uint8).reshape(-1, features.itemsize).T))

    def decoded(blob: bytes, out: Any) -> None:
        planes = np.frombuffer(decompressor.decompress(blob, max_output_size=out.nbytes), np.uint8)
        planes, words = planes.reshape(out.itemsize, -1), out.reshape(-1).view(f"u{out.itemsize}")
        words[:] = planes[0]
        for place in range(1, out.itemsize):
            words |= np.left_shift(planes[place], 8 * place, dtype=words.dtype)

    return coded, decoded


def plain_zstd() -> Coder:
    """What a compressed shard or npz amounts to."""
    compressor, decompressor = zstandard.ZstdCompressor(level=1), zstandard.ZstdDecompressor()

    def decoded(blob: bytes, out: Any) -> None:
        plain = decompressor.decompress(blob, max_output_size=out.nbytes)
        out.reshape(-1)[:] = np.frombuffer(plain, out.dtype)

    return lambda features: compressor.compress(features.tobytes()), decoded


def bitmap() -> Coder:
    """Which elements are not zero, and those."""

    def coded(features: Any) -> Any:
        words = features.reshape(-1).view(f"u{features.itemsize}")
        return np.packbits(words != 0), words[words != 0]

    def decoded(blob: Any, out: Any) -> None:
        words = out.reshape(-1).view(f"u{out.itemsize}")
        words[:] = 0
        words[np.unpackbits(blob[0], count=out.size).view(bool)] = blob[1]

    return coded, decoded


def ours(codec: str) -> Coder:
    """vlscale's."""

    def decoded(blob: Any, out: Any) -> None:
        decode_into(codec, np.frombuffer(blob, np.uint8), out)

    return lambda features: encode(codec, features), decoded


def size_of(blob: Any) -> int:
    """Bytes of what a coder returned."""
    return len(blob) if isinstance(blob, bytes) else sum(part.nbytes for part in blob)


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    coders = {
        "lossless": ours("lossless"),
        "byte shuffle + zstd": shuffled_zstd(),
        "zstd": plain_zstd(),
        "bitmap + non-zeros": bitmap(),
        "uint8 (lossy)": ours("uint8"),
    }
    sets = {f"{zeros:.0%} zeros, float16": half_normal(zeros) for zeros in (0.0, 0.05, 0.5, 0.8)}
    sets["50% zeros, float32"] = half_normal(0.5, "float32", 8)
    sets |= real_features()
    print(f"{'':34} {'':20} {'size':>6} {'encode':>10} {'decode':>10}")
    for name, images in sets.items():
        raw = sum(image.nbytes for image in images)
        if name.startswith("real"):
            name = f"{name}, {np.mean([(image == 0).mean() for image in images]):.0%} zeros"
        out = np.empty_like(images[0])
        blobs, encoding = {}, {}
        for coder, (coded, _) in coders.items():
            began = time.perf_counter()
            blobs[coder] = [coded(image) for image in images]
            encoding[coder] = raw / (time.perf_counter() - began) / 1e9
        times: dict[str, list[float]] = {coder: [] for coder in coders}
        for _ in range(RUNS):
            for coder, (_, decoded) in coders.items():
                began = time.perf_counter()
                for blob in blobs[coder]:
                    decoded(blob, out)
                times[coder].append(time.perf_counter() - began)
        for coder in coders:
            size = sum(map(size_of, blobs[coder])) / raw
            speed = raw / statistics.median(times[coder]) / 1e9
            print(f"{name:34} {coder:20} {size:6.3f} {encoding[coder]:5.2f} GB/s {speed:5.2f} GB/s", flush=True)


if __name__ == "__main__":
    main()
