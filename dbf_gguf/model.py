"""The transformers model, with some of its linears in factorized form.

`DBFLinear` computes y = a ⊙ (A (m ⊙ (B (b ⊙ x)))) + bias. Its signs are constants, its scales parameters. The signs
are held in the dtype they are multiplied in: on a CPU casting them at every call would cost more than the product.
Where products are looked up (`lookup`), int8 does.

`join_linears` makes one linear of some that read the same input, before anything else is done (`join`).
"""

import json
import re
import threading
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from .checkpoint import FINAL, SCALES, WorkFolder
from .errors import DBFError
from .factorize import product_dtype
from .factors import Factors
from .join import NONE, Join, chosen

transformers_logging.disable_progress_bar()
transformers_logging.set_verbosity_error()


class DBFLinear(nn.Module):
    """A factorized linear. scale_a [n_out], scale_m [k], scale_b [n_in] are float32 parameters; signs are buffers."""

    def __init__(self, factors: Factors, bias: torch.Tensor | None = None, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.register_buffer("signs_a", factors.signs_a.to(dtype), persistent=False)  # [n_out, k]
        self.register_buffer("signs_b", factors.signs_b.to(dtype), persistent=False)  # [k, n_in]
        for scale in SCALES:
            setattr(self, scale, nn.Parameter(getattr(factors, scale).float()))
        self.bias = None if bias is None else nn.Parameter(bias.detach().float(), requires_grad=False)
        self.lookup: Callable[[torch.Tensor], torch.Tensor] | None = None  # computes y without the bias (`lookup`)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., n_in] -> [..., n_out], in x's dtype; products in the signs' dtype, in x's where that is int8."""
        if self.lookup is not None and not self.signs_a.requires_grad:
            y = self.lookup(x)
        else:
            dtype = self.signs_a.dtype if self.signs_a.is_floating_point() else x.dtype
            hidden = nn.functional.linear((x * self.scale_b.to(x.dtype)).to(dtype), self.signs_b.to(dtype))
            y = nn.functional.linear(hidden * self.scale_m.to(dtype), self.signs_a.to(dtype)) * self.scale_a.to(dtype)
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)
        return y.to(x.dtype)


_last = threading.local()  # .seen: (linear, its input, the parts of its output) of the joint linear it is at


class Rows(nn.Module):
    """The rows of one part of a joint linear, in the place of that part.

    The first part computes the whole, for the others of this passage too: an attention calls q, k, v one after the
    other with the same tensor, an MLP gate and up. A part that is called otherwise computes the whole anew. What is
    kept between the calls belongs to the thread, and is gone with the last part.

    shared  the joint linear in a list that all parts have in common: whoever replaces it does so there (`put`). As a
            module of its own it would appear once for every part.
    sizes   how many rows each part has; this one is number `place`
    """

    def __init__(self, shared: list[nn.Module], sizes: list[int], place: int):
        super().__init__()
        self.shared, self.sizes, self.place = shared, sizes, place

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        (linear,) = self.shared
        seen = getattr(_last, "seen", None)
        _last.seen = None
        known = self.place and seen is not None and seen[0] is linear and seen[1] is x
        # split at once: the gradients of the parts then meet in one tensor, instead of one each that is mostly zeros
        parts = seen[2] if known else linear(x).split(self.sizes, dim=-1)
        if self.place + 1 < len(self.sizes):
            _last.seen = (linear, x, parts)
        return parts[self.place]


def join_linears(model: nn.Module, setting: str) -> None:
    """Joins linears of a model in place, on whatever device they are; what has no such parts stays as it is."""
    for found in chosen(setting):
        # linears are not in the list: one that has been joined would live as long as it
        for parent in [module for module in model.modules() if not isinstance(module, nn.Linear)]:
            children = dict(parent.named_children())
            if all(isinstance(children.get(part), nn.Linear) for part in found.parts):
                _join(parent, children, found)


def _join(parent: nn.Module, children: dict[str, nn.Module], found: Join) -> None:
    parts = [children[part] for part in found.parts]
    if len({part.bias is None for part in parts}) > 1:
        raise DBFError(f"--join: of {', '.join(found.parts)} only some have a bias; leave them separate")
    weight = torch.cat([part.weight.detach() for part in parts])
    bias = None if parts[0].bias is None else torch.cat([part.bias.detach() for part in parts])
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    shared, sizes = [linear], [part.out_features for part in parts]
    for place, part in enumerate(found.parts):
        children[part] = Rows(shared, sizes, place)
    for name in children:
        delattr(parent, name)
    for name, child in ({found.joint: linear} | children).items():  # it comes first, as its parts did
        setattr(parent, name, child)


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    """Puts `module` in the place of the linear `name`, also for its parts if it is a joint one."""
    parent, _, child = name.rpartition(".")
    parent = model.get_submodule(parent)
    old = getattr(parent, child)
    setattr(parent, child, module)
    for part in parent.children():
        if isinstance(part, Rows) and part.shared[0] is old:
            part.shared[0] = module


def load_dense(folder: Path, dtype: torch.dtype = torch.float32, device: str = "cpu", join: str = NONE):
    """The model of a local Hugging Face folder, frozen, in eval mode, without dropout, linears joined by `join`.

    Raises DBFError when it cannot be loaded or lacks weights.
    """
    with one_line(folder):
        model, report = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, local_files_only=True, output_loading_info=True
        )
    if report["missing_keys"]:  # transformers would go on with random ones
        raise DBFError(f"{folder} has no weight {sorted(report['missing_keys'])[0]}: it is incomplete")
    stop_dropout(model)  # gradient checkpointing needs the training mode, in which it would be random
    join_linears(model, join)
    model.requires_grad_(False)
    return model.eval().to(device)


def stop_dropout(model: nn.Module) -> None:
    """Lets a model compute the same in training mode as in eval mode."""
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
        if isinstance(module, nn.Dropout):
            module.p = 0.0


@contextmanager
def one_line(folder: Path):
    """Turns what transformers, safetensors and config validation raise, each types of their own, into a DBFError."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise
        reason = (str(error).strip().splitlines() or [""])[0]
        raise DBFError(f"{folder} cannot be loaded as a model ({type(error).__name__}: {reason})") from None


def is_out_of_memory(error: Exception) -> bool:
    """Whether the memory of any device is exhausted; torch has an exception type for it only on CUDA."""
    return isinstance(error, MemoryError) or bool(re.search("out of memory|can't allocate memory", str(error)))


def block_linears(model) -> dict[str, nn.Linear]:
    """The linears inside the decoder blocks, by module name, in the model's order: what is factorized."""
    layers = model.model.layers
    return {
        f"model.layers.{name}": module for name, module in layers.named_modules() if isinstance(module, nn.Linear)
    }


def linear_shapes(folder: Path, join: str = NONE) -> dict[str, tuple[int, int]]:
    """(n_out, n_in) of every block linear, from the config alone; `join` as everywhere, a `join.CHOICES`.

    Raises DBFError when transformers refuses the config.
    """
    model = _skeleton(folder)
    join_linears(model, join)
    return {name: tuple(module.weight.shape) for name, module in block_linears(model).items()}


def _skeleton(folder: Path):
    """The model that config.json describes, on the meta device: shapes without values."""
    with one_line(folder), torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder, local_files_only=True))


def check_weights(folder: Path, files: dict[str, Path], what: str) -> dict[str, tuple[int, ...]]:
    """Shapes of all parameters of the model in `folder`, whose `weight_files` are `files`.

    Raises DBFError, in which the model is called `what`, when one of them is not there, or in another shape than
    config.json says.
    """
    wanted = {name: tuple(parameter.shape) for name, parameter in _skeleton(folder).named_parameters()}
    stored = {}
    for path in sorted(set(files.values())):
        with safe_open(str(path), "pt") as f:
            stored |= {name: tuple(f.get_slice(name).get_shape()) for name in f.keys()}  # noqa: SIM118, no mapping
    for name, shape in wanted.items():
        if name not in stored:
            raise DBFError(f"{what} has no weight {name}: its safetensors are incomplete")
        if stored[name] != shape:
            raise DBFError(f"{what}: {name} is {list(stored[name])}, config.json makes it {list(shape)}")
    return wanted


def weight_files(folder: Path) -> dict[str, Path]:
    """The safetensors file that holds each tensor of a Hugging Face folder, of those that transformers would read.

    Raises DBFError for a damaged one; one that is not there is left out.
    """
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    paths = [whole]
    if not whole.exists() and index.exists():
        paths = sorted({folder / name for name in json.loads(index.read_text())["weight_map"].values()})
    found = {}
    for path in filter(Path.exists, paths):
        try:
            with safe_open(str(path), "pt") as f:
                found |= dict.fromkeys(f.keys(), path)
        except SafetensorError as error:
            raise DBFError(f"{path} is damaged ({error}): fetch the model again") from None
    return found


def norm_weights(model) -> dict[str, nn.Parameter]:
    """The weights of the normalization layers by parameter name ("model.norm.weight")."""
    return {
        f"{name}.weight": module.weight
        for name, module in model.named_modules()
        if "norm" in type(module).__name__.lower() and getattr(module, "weight", None) is not None
    }


def replace_linear(model, name: str, factors: Factors, dtype: torch.dtype) -> None:
    """Puts a DBFLinear in the place of the linear `name`, keeping its bias and device."""
    old = model.get_submodule(name)
    put(model, name, DBFLinear(factors, old.bias, dtype).to(old.weight.device))


@contextmanager
def checkpointing(model, enabled: bool = True):
    """Within, blocks are recomputed in the backward pass instead of being kept (gradient checkpointing)."""
    if not enabled:
        yield
        return
    # transformers renames the pair in version 6, and checkpoints only in training mode (`load_dense` stops dropout)
    prefix = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    getattr(model, f"{prefix}_checkpointing_enable")(**{f"{prefix}_checkpointing_kwargs": {"use_reentrant": False}})
    model.disable_input_require_grads()  # hooks on the embeddings that only the reentrant kind needs
    model.train()
    try:
        yield
    finally:
        getattr(model, f"{prefix}_checkpointing_disable")()
        model.eval()


def apply_work(model, work: WorkFolder, dtype: torch.dtype) -> None:
    """Replaces every finished linear of the work folder in `model`, and the norms that were tuned."""
    for name in work.linears():
        replace_linear(model, name, work.factors(name), dtype)
    weights = norm_weights(model)
    for name, value in work.final_norms().items():
        weights[name].data = value.to(weights[name].device, weights[name].dtype)


def load(work_dir: Path | str, dtype: torch.dtype = torch.float32, device: str = "cpu"):
    """A work folder as a transformers model, for evaluation in PyTorch; the dense parts come from its source.

    `dtype` is that of activations and products (bfloat16 is faster where `product_dtype` says so). Raises DBFError when
    the folder is none, is not finished, or its source cannot be found any more.
    """
    from .source import resolve

    work = WorkFolder.open(Path(work_dir))
    if not work.has(FINAL):
        raise DBFError(f"{work_dir} is not finished: run the same `dbf-gguf convert` again to go on")
    model = load_dense(resolve(work.manifest["model"]).folder, dtype, device, work.join)
    apply_work(model, work, dtype)
    return model


def training_dtype(device: str) -> torch.dtype:
    """The dtype of activations while calibrating and tuning: bfloat16 where it is fast, else float32."""
    return product_dtype(torch.device(device))
