"""What a client must not do: each is refused, changes no weight, and leaves the others alone."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from contextlib import closing
from http.client import HTTPConnection
from typing import Any
from urllib.request import ProxyHandler, build_opener

import pytest
import torch
from remote_server import Process, served
from serve_client import Raw
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from nnatomy.remote.wire import pack

W, LONG = -1, 2**40
SYNC = ["sync"]


def t(number: int) -> dict[str, int]:
    return {"t": number}


def op(name: str, args: list[Any], numbers: Any = (50,), **kwargs: Any) -> list[Any]:
    return ["op", f"aten.{name}", args, kwargs, list(numbers)]


IDS = ["op", "aten.new_zeros.default", [t(4), [1, 4]], {}, [60]]
OPEN = [IDS, ["open", 8, {"input_ids": t(60)}]]
GO = ["go", 8, []]

#: By name: the commands, and the question after them.
COMMANDS: dict[str, tuple[list[Any], Any]] = {
    "a file is read": ([op("from_file.default", ["/etc/passwd"])], SYNC),
    "another namespace": ([["op", "prims.device_put.default", [t(2), {"device": None}], {}, [50]]], SYNC),
    "a dunder of a packet": ([op("__class__.default", [t(2)])], SYNC),
    "an attribute of a packet": ([op("add.__globals__", [t(2)])], SYNC),
    "an attribute of the namespace": ([op("_dir.name", [t(2)])], SYNC),
    "a name that is no text": ([["op", 7, [t(2)], {}, [50]]], SYNC),
    "a name of a million letters": ([["op", "a" * 10**6, [t(2)], {}, [50]]], SYNC),
    "memory that nobody has written": ([op("empty_like.default", [t(2)])], SYNC),
    "new memory that nobody has written": ([op("new_empty.default", [t(2), [1000]])], SYNC),
    "set_ to a parameter": ([op("set_.source_Tensor", [t(2), t(W)], [None])], SYNC),
    "resize_": ([op("resize_.default", [t(2), [1 << 20]], [None])], SYNC),
    "as_strided beyond its memory": ([op("as_strided.default", [t(2), [1000], [1], 0])], SYNC),
    "_reshape_alias beyond its memory": ([op("_reshape_alias.default", [t(2), [1000], [1]])], SYNC),
    "what attention calls within": (
        [op("_scaled_dot_product_flash_attention_for_cpu.default", [t(2), t(2), t(2)])],
        SYNC,
    ),
    "a backward function": ([op("embedding_dense_backward.default", [t(2), t(4), LONG, -1, False])], SYNC),
    "a write to a parameter": ([op("add_.Scalar", [t(W), 1.0], [None])], SYNC),
    "a write through a view": ([op("select.int", [t(W), 0, 0]), op("zero_.default", [t(50)], [None])], SYNC),
    "a write through detach": (
        [op("detach.default", [t(W)]), op("fill_.Scalar", [t(50), 3.0], [None])],
        SYNC,
    ),
    "a write through what returns its argument": (
        [op("positive.default", [t(W)]), op("zero_.default", [t(50)], [None])],
        SYNC,
    ),
    "a write through a transposed view of a view": (
        [
            op("t.default", [t(W)]),
            op("slice.Tensor", [t(50), 0, 0, 2], [52]),
            op("mul_.Scalar", [t(52), 0.0], [None]),
        ],
        SYNC,
    ),
    "a write by out=": ([op("add.out", [t(2), t(2)], [None], out=t(W))], SYNC),
    "an index_put_ into a parameter": ([op("index_put_.default", [t(W), [t(4)], t(2)], [None])], SYNC),
    "a copy_ into a parameter": ([op("copy_.default", [t(W), t(W)], [None])], SYNC),
    "a parameter that needs no gradient": ([["needs", W, False]], SYNC),
    "the same by what returns its argument": ([op("lift_fresh.default", [t(W)]), ["needs", 50, False]], SYNC),
    "a gradient kept by a parameter": ([["retain", W]], SYNC),
    "backward into a parameter": (
        [op("sum.default", [t(W)]), ["backward", 50, None, False, False, [W]]],
        SYNC,
    ),
    "grad of a parameter": ([op("sum.default", [t(W)])], ["grads", [50], [W], None, False, False]),
    "a parameter's number": ([["put", W, "float32", [0], [0]]], SYNC),
    "one of the server's numbers": ([op("neg.default", [t(2)], [51])], SYNC),
    "a tensor that it has not": ([op("add.Tensor", [t(814), 1])], SYNC),
    "a parameter that is not": ([op("neg.default", [t(-100_000)])], SYNC),
    "a number that is a text": ([op("neg.default", [{"t": "2"}])], SYNC),
    "random numbers": ([op("rand_like.default", [t(2)])], SYNC),
    "random numbers in place": ([op("bernoulli_.float", [t(2), 0.5], [None])], SYNC),
    "a dropout": ([op("native_dropout.default", [t(2), 0.5, True], [50, 52])], SYNC),
    "dropout in attention": (
        [op("scaled_dot_product_attention.default", [t(2), t(2), t(2), None, 0.5])],
        SYNC,
    ),
    "a terabyte of zeros": ([op("new_zeros.default", [t(2), [1 << 38]])], SYNC),
    "a repeat": ([op("repeat.default", [t(2), [100_000, 100_000]])], SYNC),
    "a broadcast": (
        [op("expand.default", [t(4), [1 << 40, 2]], [60]), op("mul.Tensor", [t(60), t(60)])],
        SYNC,
    ),
    "a sum over a broadcast": (
        [op("expand.default", [t(4), [1 << 49, 2]], [60]), op("sum.default", [t(60)])],
        SYNC,
    ),
    "padding by a terabyte": ([op("constant_pad_nd.default", [t(2), [0, 1 << 38]])], SYNC),
    "many tensors of a megabyte": (
        [op("new_zeros.default", [t(2), [1 << 18]], [100 + 2 * k]) for k in range(2000)],
        SYNC,
    ),
    "large products": (
        [
            op("new_zeros.default", [t(2), [8000, 1]], [62]),
            op("expand.default", [t(62), [8000, 20_000]], [64]),
            op("t.default", [t(64)], [66]),
            op("mm.default", [t(64), t(66)]),
        ],
        SYNC,
    ),
    "a large decomposition": (
        [
            op("new_zeros.default", [t(2), [8000, 8000]], [60]),
            op("linalg_qr.default", [t(60)], [50, 52]),
        ],
        SYNC,
    ),
    "a result sized by a value": ([op("bincount.default", [t(6)])], SYNC),
    "repeats by a value": ([op("repeat_interleave.Tensor", [t(6)])], SYNC),
    "one-hot of a value": ([op("one_hot.default", [t(6)])], SYNC),
    "a polynomial of a huge degree": ([op("special_chebyshev_polynomial_t.n_scalar", [t(2), 10**18])], SYNC),
    "an index out of range": ([op("index_select.default", [t(2), 0, t(6)])], SYNC),
    "an index out of range, in place": ([op("index_put_.default", [t(2), [t(6)], t(2)], [None])], SYNC),
    "a gather out of range": (
        [op("view.default", [t(6), [1, 1]], [60]), op("gather.default", [t(2), 0, t(60)])],
        SYNC,
    ),
    "an embedding out of range": ([op("embedding.default", [t(2), t(6)])], SYNC),
    "a scatter out of range": (
        [op("view.default", [t(6), [1, 1]], [60]), op("scatter.value", [t(2), 0, t(60), 1.0])],
        SYNC,
    ),
    "a take out of range": ([op("take.default", [t(2), t(6)])], SYNC),
    "a division of integers by zero": (
        [op("sub.Tensor", [t(4), t(4)], [60]), op("remainder.Tensor", [t(4), t(60)])],
        SYNC,
    ),
    "a text that is no option": ([op("gelu.default", [t(2)], approximate="/etc/passwd")], SYNC),
    "pinned memory": ([op("new_zeros.default", [t(2), [4]], pin_memory=True)], SYNC),
    "an argument that there is not": ([op("neg.default", [t(2)], code="x")], SYNC),
    "an unknown module": (OPEN, ["go", 8, [[10**6, "output"]]]),
    "a module that is a text": (OPEN, ["go", 8, [["__class__", "output"]]]),
    "the whole as a point": (OPEN, ["go", 8, [[0, "output"]]]),
    "an unknown point": (OPEN, ["go", 8, [[3, "nonsense"]]]),
    "code in an argument of the pass": (
        [IDS, ["open", 8, {"input_ids": t(60), "custom_generate": "x", "trust_remote_code": True}]],
        GO,
    ),
    "another method": ([IDS, ["open", 8, {"input_ids": t(60)}, "save_pretrained"]], GO),
    "ids that are out of the vocabulary": (
        [*OPEN[:1], op("add.Scalar", [t(60), 10**6], [62]), ["open", 8, {"input_ids": t(62)}]],
        GO,
    ),
    "a hundred thousand tokens": ([op("new_zeros.default", [t(4), [1, 100_000]], [60]), OPEN[1]], GO),
    "twenty passes": ([IDS, *(["open", 100 + k, {"input_ids": t(60)}] for k in range(20))], SYNC),
    "a pass that is not open": ([], ["go", 77, []]),
    "an assignment before the pass stands": ([*OPEN, ["assign", 8, t(2)]], SYNC),
    "an object that it has not": (
        [IDS, ["open", 8, {"input_ids": t(60), "past_key_values": {"object": 3}}]],
        GO,
    ),
    "a private command": ([["_op", "x"]], SYNC),
    "a command by a path": ([["op.__globals__"]], SYNC),
    "a question by a dunder": ([], ["__init__"]),
    "an unknown question": ([], ["eval", "1"]),
    "a question that is a number": ([], 7),
    "an item of many": ([], ["item", 2]),
    "too much to fetch": ([op("expand.default", [t(2), [1 << 22, 4, 4]])], ["fetch", [50]]),
    "a fetch of nothing": ([], ["fetch", 7]),
    "a view of another size": ([op("view.default", [t(2), [5, 5]])], SYNC),
    "another dtype by view": ([op("view.dtype", [t(2), {"dtype": "no_dtype"}])], SYNC),
    "a number for a dtype": ([op("_to_copy.default", [t(2)], dtype=-(2**63))], SYNC),
    "a small number for a dtype": ([op("sum.default", [t(2)], dtype=99)], SYNC),
    "a number for a memory format": ([op("clone.default", [t(2)], memory_format=9)], SYNC),
    "a number for a layout": ([op("full_like.default", [t(2), 1], layout=77)], SYNC),
    "a number for a device": ([op("full_like.default", [t(2), 1], device=3)], SYNC),
    "a dtype for a device": ([op("full_like.default", [t(2), 1], device={"dtype": "int8"})], SYNC),
    "a list repeated": ([op("mul.left_t", [[0], 1 << 40], [])], SYNC),
    "a list repeated, the other way": ([op("mul.right_", [1 << 40, [0]], [])], SYNC),
    "a power of numbers": ([op("pow.int", [10, 10**9], [])], SYNC),
    "a text": ([op("add.str", ["tanh", "tanh"], [])], SYNC),
    "a copy of a dict": ([op("copy.Dict_str", [{"dict": [["a", 1]]}], [])], SYNC),
    "the smallest integer by -1": (
        [
            op("full_like.default", [t(4), -(2**63)], [60]),
            op("div.Tensor_mode", [t(60), t(60)], [62], rounding_mode="floor"),
            op("neg.default", [t(62)], [64]),
            op("div.Tensor_mode", [t(60), t(64)], rounding_mode="trunc"),
        ],
        SYNC,
    ),
    "the smallest integer by the number -1": (
        [
            op("full_like.default", [t(4), -(2**63)], [60]),
            op("div_.Scalar_mode", [t(60), -1], [None], rounding_mode="trunc"),
        ],
        SYNC,
    ),
    "a million views": ([op("expand.default", [t(6), [1 << 20]], [60]), op("unbind.int", [t(60)], [])], SYNC),
    "two hundred million pieces": (
        [op("expand.default", [t(6), [1 << 28]], [60]), op("split.Tensor", [t(60), 1], [])],
        SYNC,
    ),
    "pieces of no size": ([op("split.Tensor", [t(2), 0], [])], SYNC),
    "prompts that are views of one token": (
        [op("expand.default", [t(4), [1 << 20, 2]], [60]), ["open", 8, {"input_ids": t(60)}]],
        GO,
    ),
    "copies of a large view among the arguments": (
        [op("expand.default", [t(6), [1 << 27]], [60]), ["open", 8, {"input_ids": t(4), "labels": [t(60)] * 50}]],
        GO,
    ),
    "a sorter out of range": (
        [
            op("view.default", [t(6), [1]], [60]),
            op("slice.Tensor", [t(4), 0, 0, 1], [62]),
            op("searchsorted.Tensor", [t(62), t(4)], sorter=t(60)),
        ],
        SYNC,
    ),
    "a class that there is not": (
        [
            op("expand.default", [t(6), [4]], [60]),
            op("nll_loss_forward.default", [t(2), t(60), None, 1, -100], [50, 52]),
        ],
        SYNC,
    ),
    "a negative embedding": ([op("sub.Scalar", [t(4), 9], [60]), op("embedding.default", [t(2), t(60)])], SYNC),
    "a copy to an index out of range": (
        [op("slice.Tensor", [t(2), 0, 0, 1], [60]), op("index_copy.default", [t(2), 0, t(6), t(60)])],
        SYNC,
    ),
    "an addition at an index out of range": (
        [op("slice.Tensor", [t(2), 0, 0, 1], [60]), op("index_add.default", [t(2), 0, t(6), t(60)])],
        SYNC,
    ),
    "a fill at an index out of range": ([op("index_fill.int_Scalar", [t(2), 0, t(6), 1.0])], SYNC),
    "a scatter_reduce out of range": (
        [op("view.default", [t(6), [1, 1]], [60]), op("scatter_reduce.two", [t(2), 0, t(60), t(2), "sum"])],
        SYNC,
    ),
    "fewer values than a mask has places": (
        [
            op("ge.Scalar", [t(2), 0.0], [60]),
            op("slice.Tensor", [t(2), 0, 0, 1], [62]),
            op("masked_scatter.default", [t(2), t(60), t(62)]),
        ],
        SYNC,
    ),
    "the k-th of four": ([op("kthvalue.default", [t(2), 10**6], [50, 52])], SYNC),
    "more than there are": ([op("topk.default", [t(2), 10**6], [50, 52])], SYNC),
    "windows without end": ([op("unfold.default", [t(2), 0, 1, 0])], SYNC),
    "windows that are too large": ([op("unfold.default", [t(2), 0, 1 << 40, 1])], SYNC),
    "a negative repeat": ([op("repeat.default", [t(2), [-1, 1]])], SYNC),
    "a dimension that there is not": ([op("softmax.int", [t(2), 1 << 40])], SYNC),
    "a diagonal of a dimension with itself": ([op("diagonal.default", [t(2), 0, 1, 1])], SYNC),
    "a size that is a text": ([op("new_zeros.default", [t(2), ["4"]])], SYNC),
    "a size that is a tensor's negative": ([op("new_zeros.default", [t(2), [-5]])], SYNC),
    "negative padding": ([op("constant_pad_nd.default", [t(2), [-(1 << 62), 0]])], SYNC),
    "a product of a square of 2^40": ([op("diag_embed.default", [t(2), 1 << 40])], SYNC),
    "distances between many": (
        [op("new_zeros.default", [t(2), [1 << 20, 8]], [60]), op("cdist.default", [t(60), t(60), 2.0])],
        SYNC,
    ),
    "a value of two kinds": ([op("neg.default", [{"t": 2, "tuple": []}])], SYNC),
    "a value of no kind": ([op("neg.default", [{"code": "import os"}])], SYNC),
    "a dict whose key is a list": ([op("neg.default", [{"dict": [[[1], 1]]}])], SYNC),
    "a tuple that is a number": ([op("neg.default", [{"tuple": 5}])], SYNC),
    "a complex number of texts": ([op("neg.default", [{"complex": ["a", "b"]}])], SYNC),
    "a number that is a truth": ([op("neg.default", [t(True)])], SYNC),
    "a number that is a fraction": ([op("neg.default", [{"t": 2.0}])], SYNC),
    "a number that is a list": ([op("neg.default", [{"t": [2]}])], SYNC),
    "a number that is enormous": ([op("neg.default", [t(2**63)])], SYNC),
    "a cache at one of the server's numbers": (
        [IDS, ["open", 8, {"input_ids": t(60), "past_key_values": {"cache": 3}}]],
        GO,
    ),
    "a cache that is a tensor": ([IDS, ["open", 8, {"input_ids": t(60), "past_key_values": t(2)}]], GO),
    "a cache that is a list": ([IDS, ["open", 8, {"input_ids": t(60), "past_key_values": [[t(2), t(2)]]}]], GO),
    "an output that is a tensor": ([IDS, ["open", 8, {"input_ids": t(60), "labels": {"output": [2, []]}}]], GO),
    "tokens that are fractions": ([["open", 8, {"input_ids": t(2)}]], GO),
    "embeddings of another width": ([["open", 8, {"inputs_embeds": t(2)}]], GO),
    "all layers recorded": ([IDS, ["open", 8, {"input_ids": t(60), "output_hidden_states": True}]], GO),
    **{
        f"generate's {name}": ([IDS, ["open", 8, {"input_ids": t(60), name: value}]], GO)
        for name, value in {
            "max_new_tokens": 10**9,
            "custom_generate": "someone/code",
            "assistant_model": {"object": 1},
            "logits_processor": [],
            "stopping_criteria": [],
            "streamer": "x",
            "generation_config": {"dict": [["cache_implementation", "quantized"]]},
            "prefix_allowed_tokens_fn": "eval",
        }.items()
    },
    "a gradient of a parameter, asked for": ([], ["gradient", W]),
    "a parameter in a fetch of a gigabyte": ([], ["fetch", [W] * 10_000]),
    "backward from what needs none": ([["backward", 2, None, False, False, None]], SYNC),
    "backward of many into one": (
        [["needs", 2, True], op("mul.Scalar", [t(2), 2.0]), ["backward", 50, None, False, False, None]],
        SYNC,
    ),
    "a graph that grows": (
        [
            op("new_ones.default", [t(2), [1 << 23]], [60]),
            ["needs", 60, True],
            op("mul.Scalar", [t(60), 1.0], [62]),
            *(op("exp.default", [t(62)], [62]) for _ in range(200)),
        ],
        SYNC,
    ),
    "points that are no list": (OPEN, ["go", 8, 7]),
    "a point of three": (OPEN, ["go", 8, [[3, "output", 0]]]),
    "a point's kind that is a number": (OPEN, ["go", 8, [[3, 7]]]),
    "a point's kind that is long": (OPEN, ["go", 8, [[3, "source " + "a" * 1000]]]),
    "a negative module": (OPEN, ["go", 8, [[-1, "output"]]]),
    "a module that is a truth": (OPEN, ["go", 8, [[True, "output"]]]),
    "points in passing that there are not": (OPEN, ["go", 8, [], [[3, "nonsense"]]]),
    "a hundred thousand points": (OPEN, ["go", 8, [[3, "output"]] * 100_001]),
    "what nobody has written, inside of a module": (OPEN, ["go", 8, [[5, "source empty[0].output"]]]),
    "a skip before the pass stands": ([*OPEN, ["skip", 8, t(2)]], SYNC),
    "a pass opened twice": ([*OPEN, OPEN[1]], SYNC),
    "arguments that are a list": ([["open", 8, []]], GO),
    "a put whose number is a weight's": ([op("neg.default", [t(2)], [W])], SYNC),
    "fewer numbers than results": ([op("topk.default", [t(2), 1], [50])], SYNC),
    "numbers that are no list": ([["op", "aten.neg.default", [t(2)], {}, 50]], SYNC),
    "arguments of a function that are a text": ([["op", "aten.neg.default", "x", {}, [50]]], SYNC),
}
#: By name: frames one after the other, each commands and a question. All but the last are answered, and the last is refused.
STANDS = OPEN, ["go", 8, [[4, "output"]]]
BEFORE = OPEN, ["go", 8, [[4, "input"]]]
WIDE = op("new_ones.default", [t(2), [1, 1, 96]], [90])
STEPS: dict[str, list[tuple[list[Any], Any]]] = {
    "a longer prompt put in the middle": [
        STANDS,
        ([WIDE, op("expand.default", [t(90), [1, 20_000, 96]], [92]), ["assign", 8, t(92)]], SYNC),
    ],
    "many prompts put in the middle": [
        STANDS,
        ([WIDE, op("expand.default", [t(90), [1000, 4, 96]], [92]), ["assign", 8, t(92)]], SYNC),
    ],
    "large copies put in the middle": [
        STANDS,
        ([op("expand.default", [t(6), [1 << 27]], [92]), ["assign", 8, [t(92)] * 100]], SYNC),
    ],
    "many prompts in the place of a layer": [
        BEFORE,
        ([WIDE, op("expand.default", [t(90), [10_000, 4, 96]], [92]), ["skip", 8, t(92)]], SYNC),
    ],
    "a number in the place of a tensor": [STANDS, ([["assign", 8, 7]], SYNC)],
    "a text in the place of a tensor": [STANDS, ([["assign", 8, "x"]], SYNC)],
    "a cache in the place of a tensor": [STANDS, ([["assign", 8, {"cache": 90}]], SYNC)],
    "a skip behind a module": [STANDS, ([["skip", 8, t(2)]], SYNC)],
    "another size for a function in a module": [
        (OPEN, ["go", 8, [[5, "source view[0].input"]]]),
        (
            [
                op("new_zeros.default", [t(2), [1, 4, 96]], [90]),
                ["assign", 8, {"tuple": [{"tuple": [t(90), {"tuple": [1 << 40, 4, 96]}]}, {"dict": []}]}],
            ],
            SYNC,
        ),
    ],
    "the same pass after its end": [(OPEN, ["go", 8, []]), ([], ["go", 8, []])],
}
#: By name: whole frames.
FRAMES: dict[str, Any] = {
    "nothing": b"",
    "a text": "hello",
    "three bytes": b"\x00\x00\x00",
    "a header of four gigabytes": struct.pack("<I", 2**32 - 1) + b"x",
    "a header that is no msgpack": struct.pack("<I", 3) + b"\xc1\xc1\xc1",
    "a header that is a list": struct.pack("<I", 1) + b"\x90",
    "a header without lengths": struct.pack("<I", 1) + b"\x80",
    "lists deep in one another": struct.pack("<I", 10_003) + b"\x81\xa1b" + b"\x91" * 10_000,
    "a list that claims to be long": struct.pack("<I", 8) + b"\x81\xa1b\xdd\xff\xff\xff\xff",
    "a map with keys that are lists": struct.pack("<I", 4) + b"\x81\x91\x01\x01",
    "an extension": struct.pack("<I", 6) + b"\x81\xa1b\xd4\x01\x01",
    "lengths that are not the frame's": pack({"c": []})[:-1] + b"\x05",
    "negative lengths": struct.pack("<I", 5) + b"\x81\xa1b\x91\xff",
    "a gigabyte in a kilobyte": zlib.compress(bytes(1 << 24)),
    "a pickle": b"\x80\x04\x95\x1c\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x8c\x06system\x93\x8c\x02id\x85R.",
    "commands that are no list": pack({"c": 7}),
    "a command that is no list": pack({"c": [7]}),
    "a million commands": pack({"c": [["clear"]] * 1_000_000}),
    "values deep in one another": pack({"c": [["op", "aten.neg.default", json.loads("[" * 30 + "]" * 30), {}, [50]]]}),
}
#: By name: a put whose bytes are not its tensor's.
PUTS: dict[str, tuple[list[Any], list[bytes]]] = {
    "bytes that are missing": (["put", 60, "float32", [4], [0]], []),
    "fewer bytes than elements": (["put", 60, "float32", [1 << 40], [0]], [b""]),
    "a negative size": (["put", 60, "float32", [-1], [0]], [b""]),
    "a size that overflows": (["put", 60, "float32", [1 << 39, 1 << 39], [0, 1]], [b""]),
    "no such dtype": (["put", 60, "object", [1], [0]], [b"12345678"]),
    "a size that is a fraction": (["put", 60, "float32", [1.5], [0]], [b"123456"]),
    "an order that is none": (["put", 60, "float32", [1, 1], [0, 0]], [b"1234"]),
}


@pytest.fixture(scope="module")
def server() -> Iterator[Process]:
    with served("demo:llama", "--max-held-bytes", str(600 << 20), "--max-graph-bytes", str(200 << 20)) as process:
        yield process


@pytest.fixture(scope="module")
def other(server: Process) -> Iterator[Raw]:
    """The session of another client, in the middle of a pass."""
    with Raw(server.address) as session:
        session.put(60, torch.tensor([[1, 2, 3, 4]]))
        session.ask(SYNC, OPEN[1:])
        assert "at" in session.ask(["go", 8, [[4, "output"]]])["ok"]
        yield session


@pytest.fixture(autouse=True)
def others_go_on(server: Process, other: Raw) -> Iterator[None]:
    """After each attack the weights, the other's tensors and its pass are as they were, and new clients are served."""
    yield
    assert other.ask(["item", 6])["ok"] == 10**9
    assert "ok" in other.ask(SYNC, [op("neg.default", [t(2)], [70]), ["drop", [70]]])
    with Raw(server.address) as new:
        answer = new.ask(["fetch", [W, -2, -10]])
        assert "ok" in answer
        total = new.ask(["item", 50], [op("sum.default", [t(W)]), op("norm.Scalar", [t(-10)], [52])])["ok"]
        assert total == _first.setdefault("sum", total)


_first: dict[str, float] = {}


def digest(server: Process) -> str:
    """The hash that the server finds for its weights now."""
    opener = build_opener(ProxyHandler({}))
    with opener.open(f"{server.address}/v1/status?hash=now", timeout=60) as answer:
        return str(json.load(answer)["models"][0]["hash_now"])


@pytest.fixture(scope="module", autouse=True)
def the_weights_stay(server: Process) -> Iterator[None]:
    before = digest(server)
    yield
    assert digest(server) == before


@pytest.mark.parametrize("name", COMMANDS)
def test_commands(server: Process, name: str) -> None:
    before = digest(server)
    commands, question = COMMANDS[name]
    with Raw(server.address) as attacker:
        answer = attacker.ask(question, commands)
        assert "ok" not in answer
        assert "closed" in answer or answer["error"]["text"]
        if "closed" not in answer:
            assert "ok" in attacker.ask(SYNC)
    assert digest(server) == before


@pytest.mark.parametrize("name", STEPS)
def test_steps(server: Process, name: str) -> None:
    before = digest(server)
    *first, (commands, question) = STEPS[name]
    with Raw(server.address) as attacker:
        for each in first:
            assert "ok" in attacker.ask(each[1], each[0])
        assert "error" in attacker.ask(question, commands)
        assert "ok" in attacker.ask(SYNC)
    assert digest(server) == before


@pytest.mark.parametrize("name", [*FRAMES, *PUTS])
def test_frames(server: Process, name: str) -> None:
    with Raw(server.address) as attacker:
        if name in FRAMES:
            answer = attacker.raw(FRAMES[name])
            assert answer["closed"] == 4400
        else:
            command, blobs = PUTS[name]
            assert "ok" not in attacker.ask(SYNC, [command], blobs)


def test_a_frame_that_is_too_large(server: Process) -> None:
    with Raw(server.address) as attacker:
        assert attacker.raw(bytes(300 << 20))["closed"] in (1009, 1006)


def test_a_parameter_put_into_the_pass_is_a_copy(server: Process) -> None:
    """The model's code may change in place what it is given (GPT-2-style residuals do): not the parameter itself."""
    before = digest(server)
    with Raw(server.address) as attacker:
        attacker.put(60, torch.tensor([[1, 2, 3, 4]]))
        told = attacker.ask(["go", 8, [[4, "output"]]], OPEN[1:])["ok"]
        assert told["at"][:2] == [4, "output"]
        shape = told["value"]["t"][1] if "t" in told["value"] else told["value"]["tuple"][0]["t"][1]
        rows = [op("slice.Tensor", [t(W), 0, 0, 4], [70]), op("unsqueeze.default", [t(70), 0], [72])]
        assert shape == [1, 4, 96]
        told = attacker.ask(["go", 8, []], [*rows, ["assign", 8, t(72)]])
        assert "ok" in told
        written = [op("mul_.Scalar", [t(72), 0.0], [None])]
        assert attacker.ask(SYNC, written)["error"]["type"] == "Refused"
    assert digest(server) == before


def test_what_another_holds_is_not_to_be_had(server: Process, other: Raw) -> None:
    other.put(900, torch.ones(3))
    with Raw(server.address) as attacker:
        for number in (900, 901, 1, 3, 60):
            assert attacker.ask(["fetch", [number]])["error"]["type"] == "Refused"
        assert attacker.ask(["go", 8, []])["error"]["type"] == "Refused"


def test_a_frame_of_many_long_commands_holds_up_nobody(server: Process, other: Raw) -> None:
    large = op("new_ones.default", [t(2), [1000, 1000]], [60])
    commands = [large, *[op("mm.default", [t(60), t(60)], [62])] * 60]
    with Raw(server.address) as attacker:
        attacker.socket.send(pack({"n": 1, "c": commands, "q": SYNC}))
        assert "ok" in other.ask(SYNC)
        with pytest.raises(TimeoutError):  # it is still at it
            attacker.socket.recv(timeout=0)
        attacker.socket.recv(timeout=300)


def test_a_page_of_a_browser_may_not_come(server: Process) -> None:
    with pytest.raises(Exception, match="403"):
        Raw(server.address, Origin="https://example.org")


# What comes by HTTP, and below the frames.

#: Paths and queries, with headers; each is answered by an error of the caller's.
ASKED: dict[str, tuple[str, str, dict[str, str]]] = {
    "a file": ("GET", "/etc/passwd", {}),
    "a folder above": ("GET", "/v1/../../../../etc/passwd", {}),
    "a folder above, encoded": ("GET", "/v1/%2e%2e%2f%2e%2e%2fetc%2fpasswd", {}),
    "a file behind the status": ("GET", "/v1/status/../../keys", {}),
    "a null byte": ("GET", "/v1/status%00.html", {}),
    "a session that is negative": ("DELETE", "/v1/sessions/-1", {}),
    "a session that is a fraction": ("DELETE", "/v1/sessions/1.5", {}),
    "a session that is enormous": ("DELETE", f"/v1/sessions/{10**30}", {}),
    "a session by a path": ("DELETE", "/v1/sessions/..%2f1", {}),
    "a session read": ("GET", "/v1/sessions/1", {}),
    "a status written": ("POST", "/v1/status", {}),
    "the page deleted": ("DELETE", "/", {}),
    "a hash asked for by a page of the web": ("GET", "/v1/status?hash=now", {"Origin": "https://example.org"}),
    "a session without a WebSocket": ("GET", "/v1/session", {}),
    "a header of a megabyte": ("GET", "/v1/status", {"X-Long": "a" * (1 << 20)}),
}
#: Queries and headers of a session that is not to be had.
OPENED: dict[str, tuple[str, dict[str, str]]] = {
    "a model by a path": ("?model=../../../../etc/passwd", {}),
    "a model by an attribute": ("?model=__class__", {}),
    "no model's name": ("?model=", {}),
    "a model with a null byte": ("?model=demo:llama%00", {}),
    "a model with a line of a header": ("?model=demo:llama%0d%0aSet-Cookie:%20a=b", {}),
    "a model of script": ("?model=%3Cscript%3Ealert(1)%3C/script%3E", {}),
    "a model of a thousand letters": (f"?model={'a' * 5000}", {}),
    "two models": ("?model=demo:llama&model=demo:gpt2", {}),
    "a protocol that is a list": ("?protocol=[1]", {}),
    "a protocol that is a fraction": ("?protocol=1.0", {}),
    "a page of the web": ("", {"Origin": "http://127.0.0.1"}),
    "no page's origin": ("", {"Origin": "null"}),
}


@pytest.mark.parametrize("name", ASKED)
def test_paths(server: Process, name: str) -> None:
    method, path, headers = ASKED[name]
    with closing(HTTPConnection("127.0.0.1", server.port, timeout=60)) as asked:
        asked.putrequest(method, path, skip_accept_encoding=True)
        for key, one in headers.items():
            asked.putheader(key, one)
        try:
            asked.endheaders()
            answer = asked.getresponse()
            text = answer.read().decode()
        except OSError:
            return  # it has hung up, in the middle of the header
    assert 400 <= answer.status < 500
    assert "root:" not in text
    assert "Traceback" not in text


@pytest.mark.parametrize("name", OPENED)
def test_openings(server: Process, name: str) -> None:
    query, headers = OPENED[name]
    with pytest.raises(InvalidStatus) as denied:
        Raw(server.address, query=query, **headers)
    response = denied.value.response
    assert response.status_code in (400, 403, 404)
    assert "Set-Cookie" not in response.headers
    assert len(response.body) < 1000
    assert response.headers["Content-Type"] == "application/json"


def test_frames_are_not_compressed(server: Process) -> None:
    """No client can have it, whatever it asks for."""
    with connect(f"{server.address.replace('http', 'ws')}/v1/session", proxy=None, compression="deflate") as socket:
        assert socket.response is not None
        assert "Sec-WebSocket-Extensions" not in socket.response.headers
        assert not socket.protocol.extensions
        compressed = bytes([0xC2, 0x84, 0, 0, 0, 0]) + zlib.compress(b"x")[:4]  # the bit that says it is
        socket.socket.sendall(compressed)
        with pytest.raises(ConnectionClosed):
            socket.recv(timeout=30)


def test_a_message_of_very_many_pieces(server: Process) -> None:
    """Each takes memory, however small it is."""
    with connect(f"{server.address.replace('http', 'ws')}/v1/session", proxy=None, compression=None) as socket:
        mask = bytes(4)
        socket.socket.sendall(bytes([0x02, 0x80]) + mask)
        with pytest.raises((ConnectionClosed, OSError)):
            for _ in range(100):
                socket.socket.sendall((bytes([0x00, 0x80]) + mask) * 100)
            socket.recv(timeout=30)


def test_there_are_enough() -> None:
    assert len(COMMANDS) + len(STEPS) + len(FRAMES) + len(PUTS) + len(ASKED) + len(OPENED) >= 200
