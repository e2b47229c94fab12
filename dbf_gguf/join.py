"""Linears that read the same input as one: q, k, v as `qkv_proj`, gate, up as `gate_up_proj`, factors and all.

A DBF linear is two products, and at one token each of them costs a GPU a launch and a CPU a barrier. Stacked by rows,

    [Q]              [a_q]        [A_q]
    [K] ≈  diag      [a_k]   ·    [A_k]   · diag(m) · B · diag(b)
    [V]              [a_v]        [A_v]

q, k and v share B, m and b, and the seven linears of a block become four. At equal bits the error is about the same:
the joint k is larger, and serves all of them.

The model itself is changed before anything is computed: the joint linear is a plain `nn.Linear` like any other, which
is calibrated, factorized, tuned and stored under its own name. In the places of its parts are `model.Rows`, which hand
out their rows of its output. Phi-3's models come like this, with linears of the same names. Here are the names alone.
"""

from collections.abc import Container, Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Join:
    joint: str  # module name within its parent
    parts: tuple[str, ...]  # in the order of their rows
    base: str  # name in a GGUF file
    bases: tuple[str, ...]  # of the parts, were they stored by themselves


JOINS = {
    "qkv": Join("qkv_proj", ("q_proj", "k_proj", "v_proj"), "attn_qkv", ("attn_q", "attn_k", "attn_v")),
    "gate_up": Join("gate_up_proj", ("gate_proj", "up_proj"), "ffn_gate_up", ("ffn_gate", "ffn_up")),
}
NONE, ALL = "none", "qkv,gate_up"
CHOICES = (NONE, "qkv", "gate_up", ALL)  # of the option, and of the setting in a work folder


def effective(setting: str, linears: Iterable[str], files: Container[str]) -> str:
    """`setting` without what there is nothing to join for: the model has no such parts, or has them joined already.

    linears  names of the linears of the model that `model.join_linears` has been applied to
    files    names of all tensors in its folder
    """
    made = {name.rpartition(".")[2] for name in linears if f"{name}.weight" not in files}
    return ",".join(key for key in setting.split(",") if key in JOINS and JOINS[key].joint in made) or NONE


def stored_names(name: str, files: Container[str]) -> list[str]:
    """The tensors of a Hugging Face folder that make up the tensor `name` ("<linear>.weight"), in their order.

    files  all names in the folder
    """
    if name in files:
        return [name]
    linear, _, tensor = name.rpartition(".")
    parent, _, child = linear.rpartition(".")
    for found in JOINS.values():
        if child == found.joint:
            return [f"{parent}.{part}.{tensor}" for part in found.parts]
    return [name]


def joint_of(name: str) -> tuple[str, Join] | None:
    """(name of the joint linear, its Join) for a part's name ("model.layers.3.mlp.up_proj"), else None."""
    parent, _, child = name.rpartition(".")
    for found in JOINS.values():
        if child in found.parts:
            return f"{parent}.{found.joint}", found
    return None


def joint_base(name: str, setting: str) -> str | None:
    """The name in a GGUF file ("blk.3.attn_qkv") of a linear that is joined by `setting`, None for all others."""
    for found in chosen(setting):
        if name.endswith(f".{found.joint}"):
            return f"blk.{name.split('.')[2]}.{found.base}"
    return None


def chosen(setting: str) -> list[Join]:
    return [JOINS[key] for key in setting.split(",") if key != NONE]
