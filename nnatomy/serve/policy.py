"""Which functions of PyTorch's a client may have run at the server: a list of names, and nothing besides.

A client names an overload of `torch.ops.aten`. It is taken where its name is in `_ALLOWED` (in-place forms are those names with
an underscore behind), or PyTorch itself says that it works element by element or reduces; and where nothing in `_NEVER` or
`_why_not` is against it. So a new function of a later PyTorch is refused until somebody has looked at it.

What is refused, and why: files and other namespaces; what draws random numbers (the generator is everybody's); what shows memory
that nobody has written (`empty`), or reinterprets memory (`as_strided`, `set_`, `resize_`); `out=`; what trusts sizes or
indices in its arguments without a check (the backward functions, and what attention and normalization call within); results
whose size stands in the values of a tensor (`bincount`, `repeat_interleave` by a tensor), which could be any; and what takes
as many steps as a number says.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload, OpOverloadPacket
from torch.utils import _pytree as pytree

from nnatomy.errors import a

_ALLOWED = frozenset(
    """
    _conj _conj_physical _linalg_det _linalg_eigh _linalg_slogdet
    _linalg_solve_ex _linalg_svd _local_scalar_dense _log_softmax _safe_softmax _softmax _to_copy _unsafe_view
    addbmm addcdiv addcmul addmm addmv addr alias all allclose amax amin aminmax any argmax argmin argsort baddbmm
    binary_cross_entropy binary_cross_entropy_with_logits bmm bucketize cat cdist clamp clone constant_pad_nd copy
    cosine_similarity cross cummax cummin cumprod cumsum detach diag_embed diagonal diagonal_scatter dot elu embedding equal
    expand fill flip floor_divide full_like gather gelu ger glu hardtanh huber_loss index index_add index_copy index_fill index_put
    index_select is_nonzero isin kl_div kthvalue leaky_relu lerp lift_fresh linalg_cholesky_ex linalg_cross linalg_inv_ex
    linalg_qr linalg_vector_norm linear log_softmax logcumsumexp logsumexp masked_fill masked_scatter masked_select
    matmul max mean median min mish mm mode movedim mse_loss mul mv nan_to_num nanmedian nansum
    native_layer_norm new_full new_ones new_zeros nll_loss nll_loss_forward nonzero norm ones_like permute polar
    prelu prod real relu renorm repeat resolve_conj resolve_neg rms_norm roll scaled_dot_product_attention scatter scatter_add
    scatter_reduce searchsorted select select_scatter sigmoid silu slice slice_scatter smooth_l1_loss softmax softplus
    sort split split_with_sizes squeeze stack std std_mean sum t take tanh threshold topk trace transpose tril triu
    unbind unfold unsqueeze var var_mean view view_as_complex view_as_real where zeros_like zero
    """.split()
)  # fmt: skip
_NEVER = frozenset(
    """
    _efficientzerotensor _embedding_bag _foobar _index_put_impl_ _local_scalar_dense_ _nested_tensor_from_mask _pin_memory _print
    _test_warn_in_autograd _unique2 as_strided as_strided_ as_strided_scatter bernoulli bincount data detach_ dropout empty
    empty_like empty_permuted empty_strided from_blob from_file histc is_pinned multinomial native_dropout new_empty
    new_empty_strided normal pin_memory rand rand_like randint randint_like randn randn_like randperm record_stream
    repeat_interleave requires_grad_ resize resize_ resize_as_ retain_grad set set_ set_data squeeze_ swapaxes_ swapdims_ t_
    transpose_ uniform unique_consecutive unique_dim unsqueeze_
    """.split()
)
#: Texts that arguments may be: rounding modes, reductions, approximations, and the like.
_TEXTS = frozenset(
    """
    none tanh floor trunc sum mean prod amax amin linear lower higher nearest midpoint reduced complete left right L U max min
    """.split()
)
#: What arguments of these types are. (PyTorch takes any number for one, and looks it up in a table without a check.)
_ENUMERATED: dict[str, type] = {
    "ScalarType": torch.dtype,
    "MemoryFormat": torch.memory_format,
    "Layout": torch.layout,
    "Device": torch.device,
}
_AGAINST = (torch.Tag.nondeterministic_seeded, torch.Tag.inplace_view, torch.Tag.out)
#: Functions whose result is a Python value; and those whose result's size stands in the values of a tensor, within a bound.
GIVE_VALUES = frozenset({"_local_scalar_dense", "equal", "allclose", "is_nonzero"})
SIZED_BY_VALUES = frozenset({"nonzero", "masked_select", "index"})


class Refused(Exception):  # noqa: N818
    """A command that the server does not run; the text says why.

    Args:
        kind: what it is counted as: a limit, by its name, or "command".
    """

    def __init__(self, text: str, kind: str = "command") -> None:
        super().__init__(text)
        self.kind = kind


def overload(name: Any) -> OpOverload:
    """The overload of that name (`aten.add.Tensor`).

    Raises:
        Refused: unless clients may run it.
    """
    if not isinstance(name, str) or len(name) > 80:
        raise Refused("a function is named by a short text")
    found = _overload(name)
    if isinstance(found, str):
        raise Refused(f"{name}: {found}")
    return found


@lru_cache(2048)
def _overload(name: str) -> OpOverload | str:
    parts = name.split(".")
    if len(parts) != 3 or parts[0] != "aten" or not all(part.isidentifier() for part in parts):
        return "only functions of aten are run, by the name aten.FUNCTION.OVERLOAD"
    if parts[1].startswith("__") or parts[2].startswith("_") or f"aten::{parts[1]}" not in _schemas():
        return "there is no such function"
    packet = getattr(torch.ops.aten, parts[1])
    if not isinstance(packet, OpOverloadPacket) or parts[2] not in packet.overloads():
        return "there is no such overload"
    op: OpOverload = getattr(packet, parts[2])
    return _why_not(op) or op


@lru_cache(1)
def _schemas() -> frozenset[str]:
    return frozenset(schema.name for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("aten::"))


def _why_not(op: OpOverload) -> str:
    base = op._schema.name.removeprefix("aten::")
    plain = base.removesuffix("_")
    tags = set(op.tags)
    endless = any(
        part in base for part in ("polynomial", "polygamma", "mvlgamma", "zeta")
    )  # as many steps as an argument says
    if base in _NEVER or plain in _NEVER or base.endswith("_backward") or endless:
        return "it is refused"
    sure = "attention" in base  # these draw for dropout alone, which `check` refuses
    if any(tag in tags for tag in _AGAINST) and not sure:
        return "it draws random numbers, writes into `out`, or changes the shape of its argument"
    kinds = [str(argument.type) for argument in op._schema.arguments]
    if "Tensor" not in " ".join(kinds) or any("List[t]" in kind or "Dict" in kind for kind in kinds):
        return "it is one of numbers, texts or lists"  # [0] * 2**40
    for argument in op._schema.arguments:
        if argument.is_out or any(word in str(argument.type) for word in ("Storage", "Stream", "Generator")):
            return f"it takes {argument.name}"
    if base in _ALLOWED or plain in _ALLOWED or torch.Tag.pointwise in tags or torch.Tag.reduction in tags:
        return ""
    return "it is not among those that are allowed"


def written(op: OpOverload, args: Any, kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that it writes to."""
    targets = []
    for i, argument in enumerate(op._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            target = args[i] if i < len(args) else kwargs.get(argument.name)
            targets += [one for one in pytree.tree_leaves(target) if isinstance(one, Tensor)]
    return targets


def check(op: OpOverload, args: Any, kwargs: dict[str, Any]) -> None:
    """Raise Refused for arguments that are not to be given."""
    for leaf in pytree.tree_leaves((args, kwargs)):
        if isinstance(leaf, str) and leaf not in _TEXTS:
            raise Refused(f"{op}: the text {leaf!r:.40}")
    if kwargs.get("rounding_mode") == "trunc" and _overflows(*args[:2]):
        raise Refused(f"{op}: the smallest integer, divided by -1")  # ends the process
    for i, argument in enumerate(op._schema.arguments):
        given = args[i] if i < len(args) else kwargs.get(argument.name)
        if argument.name in ("dropout_p", "pin_memory", "generator") and given:
            raise Refused(f"{op}: {argument.name}")
        if argument.name == "layout" and given not in (None, torch.strided):
            raise Refused(f"{op}: a layout")
        kind = str(argument.real_type).removeprefix("Optional[").removesuffix("]")
        if given is not None and not isinstance(given, _ENUMERATED.get(kind, object)):
            raise Refused(f"{op}: {argument.name} is {a(kind)}")


def _overflows(number: Any, by: Any) -> bool:
    """Whether a division of integers may be of the smallest one by -1, for which processors have no result."""
    if (
        not isinstance(number, Tensor)
        or number.is_floating_point()
        or number.is_complex()
        or number.dtype == torch.bool
    ):
        return False
    if isinstance(by, Tensor):
        by_minus_one = not (by.is_floating_point() or by.is_complex()) and bool((by == -1).any())
    else:
        by_minus_one = type(by) is int and by == -1
    return by_minus_one and bool((number == torch.iinfo(number.dtype).min).any())
