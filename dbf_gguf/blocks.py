"""A causal language model of transformers, one decoder block at a time: the model as a whole is never in memory.

The skeleton lives on the meta device, where weights have shapes but no bytes. `BlockModel.block(i)` reads one block's
tensors from the safetensors files into a copy of its skeleton; the hidden states of all windows go through it before
the next one is read:

    hidden = model.embed(ids)                             # [n, length, d]
    for i in range(len(model)):
        hidden = model.run(i, model.block(i), hidden)
    logits = model.norm(hidden) @ model.head.T

What a block gets beside the hidden states (rotary embeddings, a mask where its attention slides) is up to the
architecture. So its own forward pass is run once per batch shape over blocks that only write down what they are given.

Between blocks the hidden states of all windows are kept by `Activations`, in memory or in a file.
"""

import copy
import math
import mmap
import os
import shutil
import tempfile
import threading
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from .checkpoint import WorkFolder
from .errors import DBFError
from .factors import Factors
from .join import NONE, stored_names
from .model import join_linears, one_line, replace_linear, stop_dropout, weight_files

EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
MIDDLE = "post_attention_layernorm"  # the module of a block whose input stands between attention and MLP
SHAPES_KEPT = 4  # batch shapes whose block arguments are kept
WINDOW_MEMORY = 2 << 30  # bytes for the intermediate results of all windows that run side by side
SPARE = 64 << 20  # bytes of a disk that activations leave free


class _Recorder(nn.Module):
    """Stands in for a block: writes down its arguments, hands its input on. All else is asked of the block itself."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block
        self.arguments: dict = {}

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("block"), name)

    def forward(self, hidden: torch.Tensor, **arguments) -> torch.Tensor:
        self.arguments = arguments
        return hidden


class BlockModel:
    """The model in `folder` (config.json, safetensors), its blocks and products in `dtype` on `device`.

    `join` says which linears of a block are one (`join.CHOICES`).

    `len(model)` is the number of blocks. Embedding, head and final norm are read when first asked for and kept until
    `release`; blocks belong to the caller. Safe to be called from several threads. Raises DBFError when transformers
    refuses the config, and as soon as a weight is asked for that is missing, damaged or of another shape.
    """

    def __init__(
        self, folder: Path | str, dtype: torch.dtype = torch.float32, device: str = "cpu", join: str = NONE
    ):
        self.folder, self.dtype, self.device = Path(folder), dtype, torch.device(device)
        self.files = weight_files(self.folder)
        with one_line(self.folder):
            config = AutoConfig.from_pretrained(self.folder, local_files_only=True)
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
            join_linears(model, join)
            model.requires_grad_(False).eval()
            body = model.model
            # the only values that come from the config instead of the files; on the meta device they were not computed
            body.rotary_emb = type(body.rotary_emb)(config=model.config).to(self.device)
            body.layers = nn.ModuleList(_Recorder(block) for block in body.layers)
            self._norm, body.norm = body.norm, nn.Identity()
        self.config = model.config
        self._body = body
        self._lock = threading.RLock()
        self._arguments: dict[tuple[int, int], list[dict]] = {}  # of every block, by (n, length)
        self._kept: dict[str, torch.Tensor] = {}

    def __len__(self) -> int:
        return len(self._body.layers)

    # --- the passage through the model

    @torch.no_grad()
    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """What the first block gets for token ids [n, length]: [n, length, d] in `dtype` on `device`."""
        with self._lock:
            self._body.embed_tokens.weight = nn.Parameter(self._keep(EMBEDDING), requires_grad=False)
            return self._record(ids.shape, input_ids=ids.to(self.device))

    def block(self, index: int) -> nn.Module:
        """Block `index`, dense, frozen, in eval mode, without dropout; only its own tensors are read."""
        block = copy.deepcopy(self._body.layers[index].block)
        self._fill(block, block_prefix(index))
        stop_dropout(block)  # a caller may turn the training mode on
        return block

    def run(self, index: int, block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """The output of `block` (dense or changed) in the place of block `index` on hidden states [n, length, d].

        Differentiable. The input is moved to the model's device and dtype.
        """
        arguments = self._block_arguments(hidden.shape[0], hidden.shape[1])[index]
        return block(hidden.to(self.device, self.dtype), **arguments)

    def run_mlp(self, block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """The output of `block` on what its MLP is added to: hidden states [n, length, d] behind its attention.

        The same numbers as by `run`, for blocks that have a MIDDLE.
        """
        hidden = hidden.to(self.device, self.dtype)
        return hidden + block.mlp(getattr(block, MIDDLE)(hidden))

    @property
    def norm(self) -> nn.Module:
        """The final norm, a module: `model.norm(hidden)` is what the head is multiplied with."""
        with self._lock:
            if self._norm.weight.is_meta:
                self._fill(self._norm, NORM.removesuffix("weight"))
            return self._norm

    @property
    def head(self) -> torch.Tensor:
        """Weight of the output head, [vocabulary, d]; the embedding where the two are tied."""
        with self._lock:
            return self._keep(EMBEDDING if self.config.tie_word_embeddings else HEAD)

    def release(self) -> None:
        """Frees embedding and head, until they are asked for again."""
        with self._lock:
            self._kept.clear()
            self._body.embed_tokens.weight = nn.Parameter(torch.empty(0, device="meta"), requires_grad=False)

    def workers(self, length: int, backward: bool) -> int:
        """How many windows of `length` tokens to run side by side (`threads.side_by_side`): on a CPU one a thread.

        The thread count decides; only where windows are so long that their intermediate results would exceed
        WINDOW_MEMORY, fewer. `backward`: whether these are kept for a backward pass.
        """
        if self.device.type != "cpu":
            return 1
        widths = [sum(m.weight.shape) for m in self._body.layers[0].modules() if isinstance(m, nn.Linear)]
        # inputs and outputs of all linears, and as much again for norms, attention and activation functions
        each = 2 * length * self.dtype.itemsize * (sum(widths) if backward else 2 * max(widths))
        return max(1, min(torch.get_num_threads(), WINDOW_MEMORY // each))

    # --- within

    def _keep(self, name: str) -> torch.Tensor:
        if name not in self._kept:
            self._kept[name] = self._read(name, (self.config.vocab_size, self.config.hidden_size))
        return self._kept[name]

    def _fill(self, module: nn.Module, prefix: str) -> None:
        """Reads all weights of a module on the meta device, "<prefix>self_attn.q_proj.weight" and so on."""
        with torch.no_grad():
            tensors = {name: self._read(prefix + name, tensor.shape) for name, tensor in module.state_dict().items()}
        module.load_state_dict(tensors, assign=True)
        module.requires_grad_(False)

    def _read(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """One tensor as a copy: what safetensors gives is a mapping of the file, whose pages count as memory."""
        parts = [self._stored(part) for part in stored_names(name, self.files)]
        if {part.shape[1:] for part in parts} != {torch.Size(shape[1:])} or sum(map(len, parts)) != shape[0]:
            found = " + ".join(str([*part.shape]) for part in parts)
            raise DBFError(f"{self.folder}: {name} has shape {found}, by config.json it is {[*shape]}")
        result = torch.empty(shape, dtype=self.dtype, device=self.device)
        for rows, part in zip(result.split([len(part) for part in parts]), parts, strict=True):
            rows.copy_(part)
        return result

    def _stored(self, name: str) -> torch.Tensor:
        if name not in self.files:
            raise DBFError(f"{self.folder} has no weight {name}: it is incomplete")
        path = self.files[name]
        try:
            with safe_open(str(path), "pt") as f:
                return f.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise DBFError(f"{path} is damaged ({error}): fetch the model again") from None

    def _block_arguments(self, n: int, length: int) -> list[dict]:
        with self._lock:
            if (n, length) not in self._arguments:
                zeros = torch.zeros(n, length, self.config.hidden_size, dtype=self.dtype, device=self.device)
                self._record((n, length), inputs_embeds=zeros)
            return self._arguments[n, length]

    @torch.no_grad()
    def _record(self, shape, **inputs) -> torch.Tensor:
        """Runs the body over its recorders; returns what it gives the first block."""
        hidden = self._body(**inputs, use_cache=False).last_hidden_state
        if tuple(shape) not in self._arguments:
            while len(self._arguments) >= SHAPES_KEPT:
                self._arguments.pop(next(iter(self._arguments)))
            self._arguments[tuple(shape)] = [recorder.arguments for recorder in self._body.layers]
        for recorder in self._body.layers:
            recorder.arguments = {}
        return hidden


def block_prefix(index: int) -> str:
    """What the names of a block's parameters and modules begin with in the model."""
    return f"model.layers.{index}."


def linears(index: int, block: nn.Module) -> dict[str, nn.Linear]:
    """The dense linears of block `index` by their name in the model ("model.layers.3.mlp.up_proj"), in its order."""
    prefix = block_prefix(index)
    return {prefix + name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}


def replace(index: int, block: nn.Module, name: str, factors: Factors, dtype: torch.dtype) -> None:
    """Puts a DBFLinear in the place of linear `name` (its name in the model) of block `index`; see `replace_linear`."""
    replace_linear(block, name.removeprefix(block_prefix(index)), factors, dtype)


def apply_work(index: int, block: nn.Module, work: WorkFolder, dtype: torch.dtype) -> None:
    """Replaces every finished linear of the work folder in block `index`, and its norms that were tuned."""
    for name in [name for name in linears(index, block) if name in work.manifest["linears"]]:
        replace(index, block, name, work.factors(name), dtype)
    apply_norms(block, block_prefix(index), work.final_norms())


def apply_norms(module: nn.Module, prefix: str, norms: dict[str, torch.Tensor]) -> None:
    """Writes tuned norm weights (`WorkFolder.final_norms`) into the parameters of `module` that they belong to."""
    for name, parameter in module.named_parameters():
        if prefix + name in norms:
            parameter.data = norms[prefix + name].to(parameter.device, parameter.dtype)


class Activations:
    """Hidden states [count, length, d] of `dtype`: in memory up to `budget` bytes, beyond it in a file in `folder`.

    The file is mapped and has no name, so it is gone with this object or this process, however that ends. Reading and
    writing copy, and the pages of the file that they touched are given back: they do not add up to the whole in memory.
    Raises DBFError when the disk is too full.
    """

    def __init__(self, count: int, length: int, d: int, dtype: torch.dtype, folder: Path, budget: int):
        shape = (count, length, d)
        self.bytes = math.prod(shape) * dtype.itemsize
        self.in_memory = not self.on_disk(*shape, dtype, budget)
        self._map = None
        if self.in_memory:
            self._values = torch.empty(shape, dtype=dtype)
            return
        free = shutil.disk_usage(folder).free
        if self.bytes + SPARE > free:
            raise DBFError(
                f"the disk of {folder} is too full: activations take {self.bytes / 2**20:,.0f} MiB, "
                f"{free / 2**20:,.0f} MiB are free"
            )
        try:
            with tempfile.TemporaryFile(dir=folder) as file:
                if hasattr(os, "posix_fallocate"):  # else a disk that fills up later would kill the process
                    os.posix_fallocate(file.fileno(), 0, self.bytes)
                else:
                    file.truncate(self.bytes)
                self._map = mmap.mmap(file.fileno(), self.bytes)
        except OSError as error:
            raise DBFError(f"cannot keep activations in {folder}: {error.strerror or error}") from None
        self._values = torch.frombuffer(self._map, dtype=dtype).view(shape)

    @staticmethod
    def on_disk(count: int, length: int, d: int, dtype: torch.dtype, budget: int) -> int:
        """Bytes of the file that such ones have."""
        size = count * length * d * dtype.itemsize
        return size if size > budget else 0

    def __len__(self) -> int:
        return len(self._values)

    def read(self, index) -> torch.Tensor:
        """A copy of the windows at `index` (an int, a slice or a tensor of indices), on the CPU."""
        values = self._values[index].clone()
        self._drop_pages()
        return values

    def write(self, index, values: torch.Tensor) -> None:
        """Writes windows, from any device and dtype."""
        self._values[index] = values.detach().to("cpu", self._values.dtype)
        self._drop_pages()

    def _drop_pages(self) -> None:
        if self._map is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)  # of this process' memory, not of the file
