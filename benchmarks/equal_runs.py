"""What equal runs depend on besides their seed: where numbers begin in memory, and what a process decides at its start.

Operations are given the same values at every multiple of four bytes from a boundary of 64; a small training step is
taken again and again between blocks of random sizes; fresh processes take the first steps of toy-sd and of the
segmenter of :mod:`sfumato.edit.text_to_segmentation`. What is compared are hashes of results and gradients.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor

from benchmarks.core import Figure, in_process

OFFSETS = tuple(range(0, 64, 4))
STARTS = 150  # of the small step, in one process
PROCESSES = 200

Operation = tuple[Callable[..., Tensor], tuple[tuple[int, ...], ...]]
OPERATIONS: dict[str, Operation] = {
    "sum": (lambda x: x.sum(), ((1000, 37),)),
    "sum of rows": (lambda x: x.sum(-1), ((64, 77),)),
    "sum of columns": (lambda x: x.sum(0), ((64, 77),)),
    "mean": (lambda x: x.mean(), ((4, 3, 32, 32),)),
    "variance": (lambda x: x.var(-1), ((64, 77),)),
    "norm": (lambda x: x.norm(), ((1000, 7),)),
    "logsumexp": (lambda x: x.logsumexp(-1), ((64, 77),)),
    "softmax": (lambda x: x.softmax(-1), ((64, 77),)),
    "exp": (lambda x: x.exp(), ((64, 77),)),
    "gelu": (F.gelu, ((64, 77),)),
    "silu": (F.silu, ((64, 77),)),
    "division": (lambda x, y: x / y, ((64, 77), (64, 77))),
    "layer_norm": (lambda x, w, b: F.layer_norm(x, (77,), w, b), ((64, 77), (77,), (77,))),
    "group_norm": (lambda x, w, b: F.group_norm(x, 8, w, b), ((3, 32, 9, 9), (32,), (32,))),
    "batch_norm": (lambda x, w, b: F.batch_norm(x, None, None, w, b, True), ((3, 32, 9, 9), (32,), (32,))),
    "mse_loss": (F.mse_loss, ((3, 4, 9, 9), (3, 4, 9, 9))),
    "linear": (F.linear, ((3, 77, 64), (96, 64), (96,))),
    "linear, odd widths": (F.linear, ((3, 77, 37), (53, 37), (53,))),
    "linear of one row": (F.linear, ((1, 64), (96, 64), (96,))),
    "matrix times vector": (lambda w, x: w @ x, ((96, 64), (64,))),
    "vector times vector": (lambda x, y: x @ y, ((777,), (777,))),
    "matmul": (lambda x, y: x @ y, ((77, 64), (64, 53))),
    "bmm": (torch.bmm, ((6, 77, 24), (6, 24, 77))),
    "einsum": (lambda x, y: torch.einsum("bnd,btd->bnt", x, y), ((6, 77, 24), (6, 12, 24))),
    "attention": (F.scaled_dot_product_attention, ((2, 4, 77, 16), (2, 4, 12, 16), (2, 4, 12, 16))),
    "conv 3x3": (lambda x, w, b: F.conv2d(x, w, b, padding=1), ((2, 16, 16, 16), (24, 16, 3, 3), (24,))),
    "conv 1x1": (F.conv2d, ((2, 16, 16, 16), (24, 16, 1, 1), (24,))),
    "conv, stride 2": (lambda x, w, b: F.conv2d(x, w, b, 2, 1), ((2, 16, 16, 16), (24, 16, 3, 3), (24,))),
    "interpolate": (lambda x: F.interpolate(x, scale_factor=2.0, mode="bilinear"), ((2, 4, 9, 9),)),
    "cumsum": (lambda x: x.cumsum(-1), ((64, 77),)),
}


def placed(values: Tensor, offset: int) -> Tensor:
    """These numbers, ``offset`` bytes (a multiple of 4) behind a boundary of 64."""
    room = torch.empty(values.nbytes + 128, dtype=torch.uint8)
    begin = -room.data_ptr() % 64 + offset
    held = room[begin : begin + values.nbytes].view(torch.float32).view(values.shape)
    held.copy_(values)
    assert held.data_ptr() % 64 == offset % 64
    return held


def digest(tensors: Iterable[Tensor]) -> str:
    found = hashlib.sha256()
    for each in tensors:
        found.update(each.detach().contiguous().numpy().tobytes())
    return found.hexdigest()[:12]


def results(name: str, offsets: tuple[int, ...] = OFFSETS) -> int:
    """How many different results, gradients with them, an operation has over where its arguments begin: all alike, and
    each for itself."""
    function, shapes = OPERATIONS[name]
    rng = np.random.default_rng(0)
    made = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=made) for shape in shapes]
    places = [(offset,) * len(shapes) for offset in offsets]
    places += [tuple(rng.choice(offsets, len(shapes)).tolist()) for _ in offsets] if len(shapes) > 1 else []
    found = set()
    for place in places:
        given = [placed(*each).requires_grad_() for each in zip(values, place, strict=True)]
        out = function(*given)
        found.add(digest([out, *torch.autograd.grad(out.square().sum(), given)]))
    return len(found)


# --- a small training step -------------------------------------------------------------------------------------------


def network() -> UNet2DConditionModel:
    """A U-Net of two levels with cross-attention, from one seed."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, block_out_channels=(32, 64), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32, attention_head_dim=8, norm_num_groups=8,
    )  # fmt: skip


def step(net: UNet2DConditionModel, given: dict[str, Tensor]) -> str:
    """The hash of loss and gradients of one step: the denoising loss, and one on where attention to a word lies."""
    net.zero_grad()
    kept: list[Tensor] = []
    layer = net.down_blocks[0].attentions[0].transformer_blocks[0].attn2
    handle = layer.to_q.register_forward_hook(lambda module, args, out: kept.append(out))
    out = net(given["x"] + given["eps"], 500, given["text"]).sample
    handle.remove()
    align = (kept[0] @ layer.to_k(given["text"]).transpose(1, 2) / 8).softmax(-1)[..., 3]
    loss = F.mse_loss(out, given["eps"]) + F.mse_loss(align, given["mask"].sigmoid())
    loss.backward()
    return digest([loss, *(each.grad for each in net.parameters() if each.grad is not None)])


def starts(count: int, offsets: tuple[int, ...], weights: bool, seed: int = 0) -> Counter[str]:
    """Hashes of so many steps between blocks of random sizes; inputs begin at one of ``offsets`` each, with ``weights``
    so do the parameters."""
    rng, found, net = np.random.default_rng(seed), Counter[str](), network()
    made = torch.Generator().manual_seed(1)
    shapes = {"x": (4, 4, 16, 16), "eps": (4, 4, 16, 16), "text": (4, 12, 32), "mask": (4, 256)}
    inputs = {name: torch.randn(shape, generator=made) for name, shape in shapes.items()}
    values = {name: value.detach().clone() for name, value in net.named_parameters()}
    held: list[Any] = []
    for _ in range(count):
        held = [each for each in held if rng.random() < 0.7]
        held += [torch.empty(int(rng.integers(1, 200_000)), dtype=torch.uint8) for _ in range(20)]
        held += [np.empty(int(rng.integers(1, 50_000)), np.uint8) for _ in range(20)]
        given = {name: placed(each, int(rng.choice(offsets))) for name, each in inputs.items()}
        if weights:
            for name, parameter in net.named_parameters():
                parameter.data = placed(values[name], int(rng.choice(offsets)))
        found[step(net, given)] += 1
    return found


# --- fresh processes -------------------------------------------------------------------------------------------------

FIRST_STEPS = """
import os, random
heap = random.Random(os.urandom(8))
blocks = [bytearray(heap.randrange(1, 300_000)) for _ in range(400)]
del blocks[:: heap.randrange(2, 9)]
import hashlib, json, pathlib, tempfile, torch
from sfumato.training.recipe import Recipe, load_recipe
from sfumato.training.runs import TrainingRun
from sfumato.edit.text_to_segmentation.segmenter import train_segmenter
torch.set_num_threads(1)
said = load_recipe("toy-sd").model_dump()
said["data"].update(train=8, val=8)
said["train"].update(batch=8, steps=2)
run, logs = TrainingRun(Recipe.model_validate(said), pathlib.Path(tempfile.mkdtemp()), device="cpu"), []
run.trainer.walk(2, lambda log: logs.append(run.trainer.scalars(log)), None)
pictures = torch.rand(8, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
net = train_segmenter(pictures, pictures[:, 0] > 0, iterations=2, batch=4)
bits = hashlib.sha256(b"".join(each.numpy().tobytes() for each in net.state_dict().values())).hexdigest()
print(json.dumps({"toy-sd": repr(logs), "segmenter": bits}))
"""


def run() -> list[Figure]:
    """Counts of different results; one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        counts = {name: results(name) for name in OPERATIONS}
        aligned, anywhere = starts(STARTS, (0,), False), starts(STARTS, OFFSETS, True)
    finally:
        torch.set_num_threads(threads)
    return figures(counts, aligned, anywhere, [in_process(FIRST_STEPS, threads=1) for _ in range(PROCESSES)])


def figures(
    counts: dict[str, int], aligned: Counter[str], anywhere: Counter[str], fresh: list[dict[str, str]]
) -> list[Figure]:
    """From counts of results of operations and of the small step, and what fresh processes say."""
    moved = [name for name, count in counts.items() if count > 1]
    found = [
        Figure("operations with other bits elsewhere in memory", f"{len(moved)} of {len(counts)}", "for comparison",
               None, ", ".join(moved) or "none", {"results": counts}),
        Figure("results of a training step, heap perturbed, inputs aligned", f"{len(aligned)}", "1", len(aligned) == 1,
               f"{aligned.total()} steps"),
        Figure("the same, inputs and weights at any multiple of 4 bytes", f"{len(anywhere)}", "for comparison", None,
               f"{anywhere.total()} steps"),
    ]  # fmt: skip
    for name in ("toy-sd", "segmenter"):
        results_of = Counter(each[name] for each in fresh)
        name = f"first two steps of {name}, fresh processes, heaps perturbed"
        found.append(
            Figure(name, f"{len(results_of)}", "1", len(results_of) == 1, f"{len(fresh)} starts",
                   {"results": list(results_of.values())})
        )  # fmt: skip
    return found
