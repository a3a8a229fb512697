"""What goes wrong in the first hour, each by a line of a user's, and what is then said: what was found, and how to mend it.

A script, and no test module: the suite's own checks of types would speak first. `test_wrong_use.py` runs it.
"""

from __future__ import annotations

import pickle
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import nnatomy
from nnatomy import StandardizedTransformer
from nnatomy.errors import NnatomyError
from nnatomy.methods import ActivationStore, LogitLens, SteeringVector, TunedLens, collect_activations, logit_lens
from nnatomy.methods.result import Result
from nnatomy.plans import from_control_vector, from_pyvene, load_plan
from nnatomy.plots import bars, circuit, curves, heat_map
from nnatomy.plots import save as save_figure
from nnatomy.standardized import ActivationCache
from nnatomy.standardized.image_tokens import ImageTokens
from nnatomy.standardized.media_tokens import VideoTokens

LIBRARY = Path(nnatomy.__file__).parent
warnings.simplefilter("error")
m = StandardizedTransformer("demo:gpt2")
P = "The capital of France is"
v = torch.ones(96)
MASK = torch.tensor([True, False, True, False, False])
PHOTO, CLIP = ImageTokens(0, 0, torch.arange(16), (4, 4)), VideoTokens(0, 0, torch.arange(16), (1, 4, 4))
_, C = m.run_with_cache(P, ["layers_output"], layers=[1])


# Files of each kind, each of which is handed to what reads another kind.
FILES = tempfile.TemporaryDirectory()
D = Path(FILES.name)
PLAN = m.record(lambda: m.skip_layer(1))
PLAN.save(D / "plan")
LENS = logit_lens(m, P)
LENS.save(D / "lens")
C.save(D / "cache")
SteeringVector({1: v}, "layers_output", "gpt2", "given").save(D / "vector")
TunedLens.identity(m).save(D / "tuned")
collect_activations(m, [P], points={"layers_output": [1]}, folder=D / "store", progress=False)
(D / "text").write_text("hello")
(D / "empty").mkdir()


def tr(ask: Callable[[], Any]) -> Callable[[], None]:
    """Ask in a trace."""

    def traced() -> None:
        with m.trace(P):
            ask()

    return traced


def setl(layers: Any, value: Any) -> Callable[[], None]:
    def put() -> None:
        m.layers_output[layers] = value

    return put


class Wrong(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[..., :5]


def attach_out() -> None:
    attached = m.attach("layers_output[2]", Wrong())
    with attached.trace(P):
        attached.logits


def late() -> None:
    with m.trace(P):
        m.layers_output[3]
        m.layers_output[1]


def gen_iter() -> None:
    with m.generate(P, max_new_tokens=2) as tracer:
        for _ in tracer.iter[-1]:
            pass


def gen_true() -> None:
    with m.generate(P, max_new_tokens=2) as tracer:
        for _ in tracer.iter[True]:
            pass


def inv() -> None:
    with m.trace(P) as tracer:
        with tracer.invoke(P):
            m.logits


def invboth() -> None:
    with m.trace():
        m.logits


def used_twice() -> None:
    trace = m.trace(P)
    with trace:
        m.logits
    with trace:
        m.logits


def result_early() -> None:
    with m.trace(P) as tracer:
        m.layers_output[1]
    tracer.result


#: What is asked, the error, and how its text begins.
ROWS: list[tuple[Callable[[], Any], str, str]] = [
    (
        lambda: m.trace("word " * 400),
        "InputError",
        "The prompt is of 2000 tokens, and GPT2LMHeadModel has no positions for more than 128 (max_position_embeddings=128 in i",
    ),
    (
        tr(lambda: m.layers_output(3)),
        "UsageError",
        "layers_output(...): a layer stands in square brackets, layers_output[3].",
    ),
    (tr(lambda: m.layers_output[99]), "LayerIndexError", "layers_output[99]: the model has 6 layers, 0 to 5."),
    (tr(lambda: m.layers_output[1.5]), "LayerIndexError", "layers_output[1.5]: layers are counted, 0 to 5, or sliced."),
    (tr(lambda: m.layers_output["3"]), "LayerIndexError", "layers_output['3']: layers are counted, 0 to 5, or sliced."),
    (
        tr(lambda: m.layers_output[0, 1]),
        "LayerIndexError",
        'layers_output[(0, 1)]: layers are counted, 0 to 5, or sliced. Several: model.read("layers_output", layers=[0, 1]).',
    ),
    (
        tr(lambda: m.layers_output[[0, 1]]),
        "LayerIndexError",
        'layers_output[[0, 1]]: layers are counted, 0 to 5, or sliced. Several: model.read("layers_output", layers=[0, 1]).',
    ),
    (
        tr(lambda: m.layers_output[None]),
        "LayerIndexError",
        "layers_output[None]: layers are counted, 0 to 5, or sliced.",
    ),
    (
        tr(lambda: m.steer(2, "Paris")),
        "InputError",
        "The steering vector is str, and no tensor: new(): invalid data type 'str'. Give one of (96), such as layers_output[i][",
    ),
    (
        tr(lambda: m.steer(2, v, token_positions=99)),
        "InputError",
        "batch_index=None, token_positions=99 and a vector of (96,) do not fit a stream of (1, 5, 96): positions: prompt 0 has ",
    ),
    (
        tr(lambda: m.steer(2, v, batch_index=4)),
        "InputError",
        "batch_index=4, token_positions=None and a vector of (96,) do not fit a stream of (1, 5, 96): index 4 is out of bounds ",
    ),
    (tr(lambda: m.steer(9, v)), "LayerIndexError", "layers_output[9]: the model has 6 layers, 0 to 5."),
    (
        tr(lambda: m.steer("2", v)),
        "InputError",
        "layers='2': steer adds a vector to the output of layers, by their numbers",
    ),
    (
        tr(lambda: m.steer(2, torch.ones(5))),
        "InputError",
        "The steering vector is of shape (5,), the model's residual stream of width 96: give one of (..., 96).",
    ),
    (
        tr(lambda: m.steer(2, v * float("nan"))),
        "InputError",
        "The steering vector has entries that are NaN or infinite.",
    ),
    (tr(lambda: m.steer(2, v, factor="2")), "InputError", "factor='2': it is a number."),
    (
        lambda: m.steer(2, v),
        "OutsideTraceError",
        "layers_output: values exist only while the model runs. Ask for them inside `with model.trace(...):`, in the thread tha",
    ),
    (
        tr(lambda: m.steer(2, None)),
        "InputError",
        "The steering vector is NoneType, and no tensor: Could not infer dtype of NoneType. Give one of (96), such as layers_ou",
    ),
    (
        lambda: StandardizedTransformer("demo:gpt2", device="cpu"),
        "InputError",
        "device='cpu': models are loaded to a device by device_map='cpu'; or move a loaded one, StandardizedTransformer(hf_mode",
    ),
    (
        lambda: StandardizedTransformer("demo:gpt2", device="cuda"),
        "InputError",
        "device='cuda': models are loaded to a device by device_map='cuda'; or move a loaded one, StandardizedTransformer(hf_mo",
    ),
    (
        lambda: StandardizedTransformer("demo:gpt2", dtype="fp16"),
        "InputError",
        "dtype='fp16': give torch.float16, or 'float16', or another dtype of torch, or 'auto'.",
    ),
    (
        lambda: StandardizedTransformer("demo:gpt2", dtype=16),
        "InputError",
        "dtype=16: give torch.float16, or 'float16', or another dtype of torch, or 'auto'.",
    ),
    (
        lambda: StandardizedTransformer(None),
        "InputError",
        "The model is None: give a model's id on the Hugging Face hub, a folder, 'demo:gpt2', or a loaded Hugging Face model an",
    ),
    (
        lambda: StandardizedTransformer(""),
        "InputError",
        "The model is '': give a model's id on the Hugging Face hub, a folder, 'demo:gpt2', or a loaded Hugging Face model and ",
    ),
    (
        lambda: StandardizedTransformer(3),
        "InputError",
        "The model is 3: give a model's id on the Hugging Face hub, a folder, 'demo:gpt2', or a loaded Hugging Face model and i",
    ),
    (
        lambda: StandardizedTransformer("./no/such/folder"),
        "LoadError",
        "There is no folder './no/such/folder' (looked for in ",
    ),
    (
        lambda: StandardizedTransformer("/no/such/folder"),
        "LoadError",
        "There is no folder '/no/such/folder' (looked for in ",
    ),
    (
        lambda: StandardizedTransformer("/etc/hostname"),
        "LoadError",
        "'/etc/hostname' is a file: give the folder, with its config.json, that save_pretrained wrote.",
    ),
    (
        lambda: StandardizedTransformer(type(m.hf_model)),
        "InputError",
        "The model is the class GPT2LMHeadModel: give a model's id on the Hugging Face hub, a folder, 'demo:gpt2', or a loaded ",
    ),
    (
        lambda: StandardizedTransformer("demo:gpt3"),
        "LoadError",
        "There is no demo model 'demo:gpt3': there are demo:gpt2, demo:llama, demo:smollm2.",
    ),
    (
        lambda: StandardizedTransformer(m),
        "InputError",
        "StandardizedTransformer is a model already: use it as it is, or give its model.hf_model.",
    ),
    (
        lambda: StandardizedTransformer("demo:gpt2", attn_implementation="fast"),
        "LoadError",
        "The model 'demo:gpt2' could not be loaded: Specified `attn_implementation=\"fast\"` is not supported. The only possible ",
    ),
    (
        lambda: StandardizedTransformer("demo:gpt2", n_layers=3),
        "InputError",
        "n_layers=3: neither from_pretrained nor the model's class takes that; a field of its config is changed there, before: ",
    ),
    (
        lambda: StandardizedTransformer(m.hf_model, 5),
        "InputError",
        "tokenizer=5: it is a tokenizer, or its id or folder. All other arguments are given by name.",
    ),
    (
        lambda: StandardizedTransformer("demo:gpt2", validate="full"),
        "InputError",
        "validate='full': it is True, False or 'shapes'.",
    ),
    (
        lambda: StandardizedTransformer("demo:gpt2", arch_config={"layers": "transformer.h"}),
        "InputError",
        "arch_config={'layers': 'transformer.h'}: it is an nnatomy.ArchConfig(layers=..., ...).",
    ),
    (
        attach_out,
        "AssignmentError",
        "<wrong: Wrong at layers_output[2], how='replace'>: layers_output[2] is of shape (1, 5, 96); what the module returned i",
    ),
    (
        lambda: m.attach("layers_output", torch.nn.Linear(96, 96)),
        "UsageError",
        "'layers_output' is no point: give a name of layers with the layer, such as 'layers_output[3]', or a module's path and .inp",
    ),
    (
        lambda: m.attach("token_embeddings", torch.nn.Linear(96, 96)),
        "UsageError",
        "'token_embeddings' is no point: give a name of layers with the layer, such as 'layers_output[3]', or a module's path and "
        ".input or .output, such as 'layers.3.output'; token_embeddings are 'transformer.wte.output'. The names of layers are "
        "layers_input, layers_output, ",
    ),
    (
        lambda: m.attach(3, torch.nn.Linear(96, 96)),
        "UsageError",
        "3 is no point: give a name of layers with the layer, such as 'layers_output[3]', or a module's path and .input or .output",
    ),
    (
        lambda: m.attach("layers_output[9]", torch.nn.Linear(96, 96)),
        "LayerIndexError",
        "layers_output[9]: the model has 6 layers, 0 to 5.",
    ),
    (
        lambda: m.attach("layers_output[2]", torch.nn.Linear(96, 96), how="sum"),
        "UsageError",
        "how='sum': it is 'replace', 'error', 'add' or 'read'.",
    ),
    (
        lambda: m.validation["layers_output"],
        "NoSuchRowError",
        "layers_output: there is a row for each place: validation['layers_output', layer], layers 0 to 5.",
    ),
    (
        lambda: m.validation["layers_output", 9],
        "NoSuchRowError",
        "layers_output[9]: there is a row for each place: validation['layers_output', layer], layers 0 to 5.",
    ),
    (
        lambda: m.validation["layer_output", 1],
        "NoSuchRowError",
        "the report has nothing of 'layer_output'; of layers_output, layers_input, mixers_output it has.",
    ),
    (
        lambda: pickle.dumps(m),
        "UsageError",
        "A StandardizedTransformer is a view of a model in this process, and cannot be pickled (saved, or sent to another proce",
    ),
    (
        lambda: torch.save(m, "/tmp/x.pt"),
        "UsageError",
        "A StandardizedTransformer is a view of a model in this process, and cannot be pickled (saved, or sent to another proce",
    ),
    (
        lambda: pickle.dumps(m.layers_output),
        "UsageError",
        "A LayerAccessor is a view of a model in this process, and cannot be pickled (saved, or sent to another process). Save ",
    ),
    (
        tr(setl(2, 0)),
        "AssignmentError",
        "layers_output[2] is a tensor; an int was assigned. For one number in all entries, assign torch.full_like(layers_output[",
    ),
    (
        tr(setl(2, [1.0])),
        "AssignmentError",
        "layers_output[2] is a tensor; a list was assigned. For one number in all entries, assign torch.full_like(layers_output",
    ),
    (
        tr(setl(2, v)),
        "AssignmentError",
        "layers_output[2] is torch.float32 of shape (1, 5, 96) on cpu; what was assigned is torch.float32 of shape (96,) on cpu",
    ),
    (
        tr(setl(2, torch.ones(1, 5, 96, dtype=torch.float64))),
        "AssignmentError",
        "layers_output[2] is torch.float32 of shape (1, 5, 96) on cpu; what was assigned is torch.float64 of shape (1, 5, 96) o",
    ),
    (
        tr(setl(slice(0, 2), [v])),
        "AssignmentError",
        "layers_output[0:2] is 2 layers; 1 were assigned. Give a list of one tensor for each.",
    ),
    (
        tr(setl(slice(0, 2), 0)),
        "AssignmentError",
        "layers_output[0:2] is 2 layers; an int was assigned. Give a list of one tensor for each.",
    ),
    (
        tr(lambda: setattr(m, "layers_output", v)),
        "AssignmentError",
        "layers_output is one for each layer: assign layers_output[i] = ..., or layers_output[:] = [one, ...].",
    ),
    (
        tr(lambda: setattr(m, "logits", 0)),
        "AssignmentError",
        "logits is a tensor; an int was assigned. For one number in all entries, assign torch.full_like(logits, number); to scal",
    ),
    (
        tr(lambda: setattr(m, "input_ids", torch.zeros(1, 5))),
        "AssignmentError",
        "input_ids can be read, and not assigned. Give other prompts to the trace.",
    ),
    (
        tr(lambda: setattr(m, "next_token_probs", v)),
        "AssignmentError",
        "next_token_probs can be read, and not assigned.",
    ),
    (tr(lambda: setattr(m, "layers", v)), "AssignmentError", "layers can be read, and not assigned."),
    (lambda: m.trace("").run(), "InputError", "Prompt 0 is empty: '' has no tokens."),
    (lambda: m.trace([]).run(), "InputError", "The prompt is empty: []."),
    (
        lambda: m.trace(5).run(),
        "InputError",
        "int is no prompt: give a string, a chat (a list of dicts with role and content), token ids, a list of these, or a dict",
    ),
    (
        lambda: m.trace([None]).run(),
        "InputError",
        "list is no prompt: give a string, a chat (a list of dicts with role and content), token ids, a list of these, or a dic",
    ),
    (
        lambda: m.trace(torch.ones(1, 3)).run(),
        "InputError",
        "Token ids are integers of shape (seq) or (batch, seq); got torch.float32 of (1, 3).",
    ),
    (
        lambda: m.trace([10**6]).run(),
        "InputError",
        "Token id 1000000 is outside of the model's vocabulary of 742 (0 to 741): were these ids made by this model's tokenizer",
    ),
    (
        lambda: m.trace([-1, 2]).run(),
        "InputError",
        "Token id -1 is outside of the model's vocabulary of 742 (0 to 741): were these ids made by this model's tokenizer?",
    ),
    (
        lambda: m.trace(torch.ones(1, 2, 3, dtype=torch.long)).run(),
        "InputError",
        "Token ids are integers of shape (seq) or (batch, seq); got torch.int64 of (1, 2, 3).",
    ),
    (
        lambda: m.trace([{"role": "user", "content": "hi"}]).run(),
        "InputError",
        "The prompt is a chat, but the tokenizer has no chat template: give it as a string, or set model.tokenizer.chat_templat",
    ),
    (
        lambda: m.trace(P, early_stopp=False).run(),
        "InputError",
        "early_stopp=...: GPT2LMHeadModel.forward makes no use of such an argument, and would pass it over without a word. Did ",
    ),
    (
        lambda: m.trace([P, "Japan"], padding_side="middle").run(),
        "InputError",
        "padding_side='middle': it is 'left' or 'right'.",
    ),
    (
        lambda: m.trace(b"abc").run(),
        "InputError",
        "bytes is no prompt: give a string, a chat (a list of dicts with role and content), token ids, a list of these, or a di",
    ),
    (
        lambda: m.trace({"text": P}).run(),
        "InputError",
        "text=...: GPT2LMHeadModel.forward makes no use of such an argument, and would pass it over without a word. The forward",
    ),
    (used_twice, "UsageError", "This trace has been used already: open a new one with .trace(...)."),
    (
        result_early,
        "NotReachedError",
        "The forward pass was stopped when the block ended, so there is no result. Ask for tracer.result inside the block, or t",
    ),
    (
        lambda: m.logits,
        "OutsideTraceError",
        "logits: values exist only while the model runs. Ask for them inside `with model.trace(...):`, in the thread that opene",
    ),
    (
        lambda: m.layers_output[1],
        "OutsideTraceError",
        "layers_output: values exist only while the model runs. Ask for them inside `with model.trace(...):`, in the thread tha",
    ),
    (
        late,
        "OutOfOrderError",
        "layers_output[1] was asked for at ",
    ),
    (
        tr(lambda: m.layer_output[1]),
        "NoSuchModuleError",
        "the model (GPT2LMHeadModel) has no submodule 'layer_output'. Did you mean 'layers_output' or 'layers_input' or 'mixers",
    ),
    (
        tr(lambda: m.transformer.g),
        "NoSuchModuleError",
        "transformer (GPT2Model) has no submodule 'g'. Its children: wte, wpe, drop, h, ln_f.",
    ),
    (
        inv,
        "UsageError",
        "This trace has inputs of its own. For blocks with an input each, open it with none: `with model.trace() as tracer:`.",
    ),
    (invboth, "InputError", "There is no prompt: give a string, token ids, or a dict with input_ids."),
    (
        lambda: m.generate(P, max_tokens=3).run(),
        "InputError",
        "max_tokens=...: GPT2LMHeadModel.generate makes no use of such an argument, and would pass it over without a word. Did ",
    ),
    (
        lambda: m.generate(P, max_new_tokens=-1).run(),
        "InputError",
        "max_new_tokens=-1: it is a whole number, 1 or more. A pass that writes nothing is a trace.",
    ),
    (
        lambda: m.generate(P, max_new_tokens=0).run(),
        "InputError",
        "max_new_tokens=0: it is a whole number, 1 or more. A pass that writes nothing is a trace.",
    ),
    (
        lambda: m.generate(P, max_new_tokens="3").run(),
        "InputError",
        "max_new_tokens='3': it is a whole number, 1 or more. A pass that writes nothing is a trace.",
    ),
    (gen_iter, "UsageError", "tracer.iter[-1]: steps are counted from 0, each once, in rising order."),
    (lambda: m.generate_text([], max_new_tokens=1), "InputError", "The prompt is empty: []."),
    (
        lambda: m.run_with_cache(P, "layer_output"),
        "InputError",
        "'layer_output' is no standard name of layers: give one of layers_input, layers_output, attentions_input, attentions_ou",
    ),
    (
        lambda: m.run_with_cache(P, "resid_post"),
        "InputError",
        "'resid_post' is no standard name of layers: give one of layers_input, layers_output, attentions_input, attentions_outp",
    ),
    (lambda: m.run_with_cache(P, layers=9), "LayerIndexError", "layers=9: the model has 6 layers, 0 to 5; none is 9."),
    (lambda: m.run_with_cache(P, layers="last"), "InputError", "layers='last': give a whole number, or several."),
    (
        lambda: m.run_with_cache(P, positions=50),
        "InputError",
        "positions: prompt 0 has 5 tokens, at 0 to 4 (or -5 to -1); there is no position 50.",
    ),
    (
        lambda: m.run_with_cache(P, positions="final"),
        "InputError",
        "positions='final': give a whole number, or several.",
    ),
    (
        lambda: m.run_with_cache(P, dtype="fp16"),
        "InputError",
        "dtype='fp16': give a torch.dtype, such as torch.float32.",
    ),
    (lambda: m.run_with_cache(P, []), "InputError", "names=[]: give one standard name or several, or None for all."),
    (
        lambda: C.mlps_output,
        "NoSuchModuleError",
        "'mlps_output' is not in the cache, which has layers_output: name it when it is filled.",
    ),
    (lambda: C.layers_output[5], "CacheError", "layers_output[5] is not in the cache: of that name it has layers 1."),
    (
        lambda: C["layers_output", 5],
        "CacheError",
        "layers_output[5] is not in the cache: of that name it has layers 1.",
    ),
    (lambda: C[5], "CacheError", "5 is not in the cache, which has layers_output: name it when it is filled."),
    (
        lambda: C.stack("mlps_output"),
        "CacheError",
        "'mlps_output' is not in the cache, which has layers_output: name it when it is filled.",
    ),
    (lambda: m.W_Q[9], "LayerIndexError", "W_Q[9]: the model has 6 layers, 0 to 5."),
    (lambda: m.W_Q["1"], "LayerIndexError", "W_Q['1']: layers are counted, 0 to 5, or sliced."),
    (
        lambda: m.W_Q.__setitem__(1, v),
        "AssignmentError",
        "W_Q[1] is a weight of the model: change its entries, with torch.no_grad(): model.W_Q[1].copy_(new), where it is a view",
    ),
    (lambda: m.W_Q(1), "UsageError", "W_Q(...): a layer stands in square brackets, W_Q[1]."),
    (
        lambda: m.W_gate[0],
        "NotInThisModelError",
        "W_gate[0]: there is none: its MLP is not gated: the activation function is applied to all that W_in gives.",
    ),
    (
        lambda: setattr(m, "W_Q", v),
        "AssignmentError",
        "W_Q is a weight of the model: change its entries, model.W_Q[i].copy_(new) under torch.no_grad(), where it is a view, o",
    ),
    (lambda: setattr(m, "W_E", v), "AssignmentError", "W_E can be read, and not assigned."),
    (lambda: m.OV(9), "LayerIndexError", "W_V[9]: the model has 6 layers, 0 to 5."),
    (lambda: m.OV("1"), "LayerIndexError", "W_V['1']: the model has 6 layers, 0 to 5."),
    (lambda: m.composition_scores(0, 1, "q"), "InputError", "by='q': it is 'Q', 'K' or 'V'."),
    (
        lambda: m.composition_scores(1, 0, "Q"),
        "InputError",
        "Layers 1 and 0: the first is before the second, of 0 to 5.",
    ),
    (lambda: m.kv_head(9), "LayerIndexError", "kv_head(9): the model has 6 heads, 0 to 5."),
    (lambda: m.kv_head("a"), "LayerIndexError", "kv_head('a'): the model has 6 heads, 0 to 5."),
    (
        lambda: m.record(lambda: None),
        "PlanError",
        "The block changes nothing: it assigns no value, and changes none in place.",
    ),
    (
        lambda: m.record(lambda: m.skip_layer(1), [P, P]),
        "InputError",
        "record(...) takes one prompt: a text, a chat, or token ids. (A plan is for any number of them.)",
    ),
    (
        lambda: StandardizedTransformer("demo:gpt2", server="127.0.0.1:9"),
        "LoadError",
        "server='127.0.0.1:9': give its address, http://HOST:PORT.",
    ),
    (
        lambda: StandardizedTransformer("demo:gpt2", server="ftp://127.0.0.1:9"),
        "LoadError",
        "server='ftp://127.0.0.1:9': give its address, http://HOST:PORT.",
    ),
    (
        lambda: StandardizedTransformer(m.hf_model, server="http://127.0.0.1:9"),
        "InputError",
        "server=..., api_key=...: they are for a model given by its name, which a server has loaded.",
    ),
    (
        lambda: StandardizedTransformer("demo:gpt2", server="http://"),
        "LoadError",
        "server='http://': give its address, http://HOST:PORT.",
    ),
    (
        lambda: StandardizedTransformer("demo:gpt2", server="http://127.0.0.1:9", device_map="cuda"),
        "InputError",
        "A remote model has been loaded and checked by its server: of the arguments there are the name, tokenizer, server and a",
    ),
    (
        lambda: m.trace(P, remote=True).run(),
        "InputError",
        "remote=True needs a server: set model.server = 'http://HOST:PORT' (and model.api_key, if it asks for one), or NNATOMY_",
    ),
    (
        lambda: m.trace(P, remote=3).run(),
        "InputError",
        "remote=True needs a server: set model.server = 'http://HOST:PORT' (and model.api_key, if it asks for one), or NNATOMY_",
    ),
    (tr(lambda: m.skip_layer(9)), "LayerIndexError", "layers_input[9]: the model has 6 layers, 0 to 5."),
    (tr(lambda: m.skip_layers(3, 1)), "LayerIndexError", "skip_layers(3, 1): no layers lie between these."),
    (tr(lambda: m.skip_layer("1")), "LayerIndexError", "skip_layer('1'): give the number of a layer, 0 to 5."),
    (
        tr(lambda: m.skip_layer(1, v)),
        "AssignmentError",
        "skip_with of layer 1 is torch.float32 of shape (1, 5, 96) on cpu; what was assigned is torch.float32 of shape (96,) on",
    ),
    (
        lambda: m.project_on_vocab(torch.ones(5)),
        "InputError",
        "project_on_vocab takes hidden states of width 96; got (5,).",
    ),
    (
        lambda: m.project_on_vocab([1.0]),
        "InputError",
        "Hidden states are a tensor of floating point numbers, (..., 96); got list.",
    ),
    (lambda: m.get_topk_closest_tokens(v, k=0), "InputError", "k=0: the model has 742 tokens; give how many of them."),
    (
        lambda: m.get_topk_closest_tokens(v, k="5"),
        "InputError",
        "k='5': the model has 742 tokens; give how many of them.",
    ),
    (
        lambda: m.get_topk_closest_tokens(torch.ones(1, 2, 96)),
        "InputError",
        "hidden_state is (hidden) or (rows, hidden); got (1, 2, 96).",
    ),
    (
        lambda: m.to_tokens([P, "Japan"]),
        "InputError",
        "The prompts are of 1, 5 tokens, and padded ids alone would not say which are padding: give the prompts themselves to t",
    ),
    (
        lambda: m.to_string("Paris"),
        "InputError",
        "to_string('Paris'): give ids of tokens; to_tokens(text) makes them of a text.",
    ),
    (lambda: m.to_string(-1), "InputError", "to_string(-1): ids of tokens are 0 or more."),
    (lambda: m.test_prompt(P, ""), "InputError", "prompt='The capital of France is', answer='': both are text."),
    (lambda: m.test_prompt(P, " Paris", top=0), "InputError", "top=0: it is a whole number, 1 or more."),
    (
        lambda: setattr(m, "tokenizer", 5),
        "InputError",
        "model.tokenizer = 5: it is a tokenizer, as AutoTokenizer.from_pretrained(...) gives, or None.",
    ),
    (lambda: m.edit(5), "UsageError", "An edit is a function without arguments; got 5."),
    (
        tr(lambda: m.read("logits")),
        "InputError",
        "'logits' is no standard name of layers: give one of layers_input, layers_output, attentions_input, attentions_output, ",
    ),
    (
        lambda: m.read("layers_output"),
        "OutsideTraceError",
        "layers_output: values exist only while the model runs. Ask for them inside `with model.trace(...):`, in the thread tha",
    ),
    (
        lambda: m.layers[1].attn_,
        "NoSuchModuleError",
        "transformer.h.1 (GPT2Block) has no submodule 'attn_'. Did you mean 'attn'? Its children: ln_1, attn, ln_2, mlp.",
    ),
    (lambda: m.attentions[9], "LayerIndexError", "self_attn of layer 9: the model has 6 layers, 0 to 5."),
    (
        lambda: m.parameters(),
        "NoSuchModuleError",
        "the model (GPT2LMHeadModel) has no submodule 'parameters'. It is an attribute of the module itself: use `.module.param",
    ),
    (
        lambda: m.to("cpu"),
        "NoSuchModuleError",
        "the model (GPT2LMHeadModel) has no submodule 'to'. It is an attribute of the module itself: use `.module.to`. Its chil",
    ),
    (
        lambda: m.eval(),
        "NoSuchModuleError",
        "the model (GPT2LMHeadModel) has no submodule 'eval'. It is an attribute of the module itself: use `.module.eval`. Its ",
    ),
    (lambda: StandardizedTransformer("~/model"), "LoadError", "There is no folder '~/model' (looked for in "),
    (
        lambda: StandardizedTransformer("demo:gpt2", tokeniser=5),
        "InputError",
        "tokeniser=5: neither from_pretrained nor the model's class takes that; did you mean tokenizer?",
    ),
    (lambda: StandardizedTransformer(m.config), "InputError", "The model is GPT2Config {"),
    (
        lambda: m.composition_scores(0, 9, "Q"),
        "InputError",
        "Layers 0 and 9: the first is before the second, of 0 to 5.",
    ),
    (lambda: m.mlps[-7], "LayerIndexError", "mlp of layer -7: the model has 6 layers, 0 to 5."),
    (
        lambda: m.attach("layers_output[2]", lambda x: x),
        "UsageError",
        "attach(point, module): it takes a torch.nn.Module; got a function.",
    ),
    # Plans and files.
    (
        lambda: load_plan(3),
        "PlanError",
        "path=3: give the path of a folder that Plan.save wrote, as a text or a pathlib.Path.",
    ),
    (lambda: load_plan(""), "PlanError", "path='': give the path of a folder that Plan.save wrote"),
    (lambda: load_plan(PLAN), "PlanError", "This is a plan already, and no path of one: apply it, plan.apply(model)."),
    (
        lambda: load_plan(D / "no"),
        "PlanError",
        f"{D / 'no' / 'plan.json'}: there is no plan: No such file or directory.",
    ),
    (
        lambda: load_plan(D / "store"),
        "PlanError",
        f"{D / 'store' / 'plan.json'}: there is no plan: No such file or directory. It holds activations: ActivationStore(path).",
    ),
    (
        lambda: load_plan(D / "plan" / "plan.json"),
        "PlanError",
        f"{D / 'plan' / 'plan.json'} is a file: give the path of a folder that Plan.save wrote. It is a part of a plan: "
        "load_plan takes the path of its folder.",
    ),
    (
        lambda: load_plan(D / "lens"),
        "PlanError",
        f"{D / 'lens'} is a file: give the path of a folder that Plan.save wrote. It is a result of a method, LogitLens: "
        "nnatomy.methods.result.Result.load(path).",
    ),
    (
        lambda: PLAN.apply("demo:gpt2"),
        "PlanError",
        "A plan is applied to a StandardizedTransformer; got a str: StandardizedTransformer('demo:gpt2').",
    ),
    (
        lambda: PLAN.apply(m.hf_model),
        "PlanError",
        "A plan is applied to a StandardizedTransformer; got a GPT2LMHeadModel: StandardizedTransformer(model, tokenizer).",
    ),
    (
        lambda: PLAN.check(3),
        "PlanError",
        "A plan is applied to a StandardizedTransformer; got an int: plan.apply(model).",
    ),
    (lambda: PLAN.apply(m, check="no"), "PlanError", "check='no': it is True or False."),
    (lambda: PLAN.summary(9), "PlanError", "block=9: the plan has 1, 0 to 0."),
    (lambda: PLAN.save(None), "PlanError", "path=None: give the path of a folder to write"),
    (
        lambda: PLAN.save(D / "text"),
        "PlanError",
        f"{D / 'text'} is a file: a plan is written to a folder, of several files.",
    ),
    (lambda: from_control_vector(3, m), "PlanError", "path=3: give the path of a GGUF file of a control vector"),
    (lambda: from_pyvene(3, m), "PlanError", "path=3: give the path of a config of pyvene's"),
    (lambda: Result.load(3), "InputError", "path=3: give the path of a file that a result's save wrote, as a text or"),
    (
        lambda: LogitLens.load(LENS),
        "InputError",
        "path=a LogitLens: give the path of a file that a result's save wrote",
    ),
    (lambda: Result.load(D / "no"), "InputError", f"There is no file {D / 'no'}."),
    (
        lambda: Result.load(D / "plan"),
        "InputError",
        f"{D / 'plan'} is a folder: give the path of a file that a result's save wrote. It holds a plan: load_plan(path).",
    ),
    (
        lambda: Result.load(D / "vector"),
        "InputError",
        f"{D / 'vector'} is no file that a result's save wrote (KeyError: 'nnatomy.Result'): give one of these. It is a "
        "steering vector: SteeringVector.load(path).",
    ),
    (
        lambda: Result.load(D / "text"),
        "InputError",
        f"{D / 'text'} is no file that a result's save wrote (SafetensorError: ",
    ),
    (lambda: LENS.save(3), "InputError", "path=3: give the path of a file to write, as a text or a pathlib.Path."),
    (
        lambda: SteeringVector.load(D / "tuned"),
        "InputError",
        f"{D / 'tuned'} is no file that SteeringVector.save wrote: KeyError('nnatomy.SteeringVector'). It is a tuned lens: "
        "TunedLens.load(path).",
    ),
    (
        lambda: SteeringVector.load(None),
        "InputError",
        "path=None: give the path of a file that SteeringVector.save wrote",
    ),
    (
        lambda: SteeringVector.load(D / "empty"),
        "InputError",
        f"{D / 'empty'} is a folder: give the path of a file that SteeringVector.save wrote.",
    ),
    (
        lambda: TunedLens.load(D / "cache"),
        "InputError",
        f"{D / 'cache'} holds no tuned lens: it has to be written by TunedLens.save. It is a cache: ActivationCache.load(path).",
    ),
    (lambda: TunedLens.load([]), "InputError", "path=[]: give the path of a file that TunedLens.save wrote"),
    (lambda: TunedLens.load(D / "tuned", 3), "InputError", "model is an int: methods take a StandardizedTransformer, "),
    (
        lambda: ActivationCache.load(D / "lens"),
        "InputError",
        f"{D / 'lens'} was not written by ActivationCache.save. It is a result of a method, LogitLens: ",
    ),
    (lambda: ActivationCache.load(5), "InputError", "path=5: give the path of a file that ActivationCache.save wrote"),
    (
        lambda: ActivationCache.load(D / "cache", 3),
        "InputError",
        "model is an int: give the StandardizedTransformer that was run.",
    ),
    (lambda: C.save(3), "InputError", "path=3: give the path of a file to write"),
    (lambda: ActivationStore(3), "InputError", "path=3: give the path of a folder that collect_activations wrote"),
    (
        lambda: ActivationStore(D / "plan"),
        "InputError",
        f"{D / 'plan'}: there are no activations here (no index.json). It holds a plan: load_plan(path).",
    ),
    (
        tr(lambda: m.steer("ssm_states", v)),
        "InputError",
        "layers='ssm_states': steer adds a vector to the output of layers, by their numbers: steer(3, vector), steer([3, 5], vector)"
        ". At another name add it in the trace, model.ssm_states[3] = model.ssm_states[3] + vector.",
    ),
    (
        tr(lambda: m.steer(None, v)),
        "InputError",
        "layers=None: steer adds a vector to the output of layers, by their numbers: steer(3, vector), steer([3, 5], vector).",
    ),
    (tr(lambda: m.steer([1, "a"], v)), "InputError", "layers=[1, 'a']: 'a' is no number of a layer."),
    (tr(lambda: m.skip_layer("a")), "LayerIndexError", "skip_layer('a'): give the number of a layer, 0 to 5."),
    (tr(lambda: m.skip_layers(1, None)), "LayerIndexError", "skip_layer(None): give the number of a layer, 0 to 5."),
    (
        lambda: PHOTO.position_of("a", 0),
        "InputError",
        "position_of('a', 0): give whole numbers, of a row and a column of patches.",
    ),
    (lambda: PHOTO.position_of(0.5, 0), "InputError", "position_of(0.5, 0): give whole numbers, of a row and a column"),
    (
        lambda: CLIP.position_of(0, 1, "b"),
        "InputError",
        "position_of(0, 1, 'b'): give whole numbers, of a frame, a row and a column of patches.",
    ),
    (
        lambda: PHOTO.region("upper"),
        "InputError",
        "rows='upper': give a slice of whole numbers, not backwards, such as slice(0, 2) for the first two.",
    ),
    (lambda: PHOTO.region(slice(0, 2), 1), "InputError", "columns=1: give a slice of whole numbers"),
    (lambda: PHOTO.region(slice("a", "b")), "InputError", "rows=slice('a', 'b', None): give a slice of whole numbers"),
    (lambda: PHOTO.arranged([1, 2]), "InputError", "values is a list: give a tensor, torch.as_tensor(values)."),
    (lambda: PHOTO.arranged(torch.zeros(16), "a"), "InputError", "axis='a': give the number of the axis of positions."),
    (
        lambda: bars([1.0, 2.0], labels=["a", "b"]),
        "InputError",
        "values is a list: give a tensor of (label), such as torch.tensor(values).",
    ),
    (
        lambda: heat_map([[1.0]], rows=["0"], columns=["a"]),
        "InputError",
        "values is a list: give a tensor of (row, column), such as torch.tensor(values).",
    ),
    (lambda: m.W_Q(), "UsageError", "W_Q(...): a layer stands in square brackets, W_Q[0]."),
    (
        lambda: m.run_with_cache(P, positions=MASK),
        "InputError",
        "positions=tensor([ True, False,  True, False, False]): that is a mask, and positions are whole numbers: give where it is",
    ),
    (
        lambda: m.run_with_cache(P, layers=[True, False]),
        "InputError",
        "layers=[True, False]: that is a mask, and layers are",
    ),
    (
        lambda: m.run_with_cache(P, positions=torch.tensor(True)),
        "InputError",
        "positions=tensor(True): give a whole number",
    ),
    (
        tr(lambda: m.steer(1, v, token_positions=MASK)),
        "InputError",
        "batch_index=None, token_positions=tensor([ True, False,  True, False, False]) and a vector of (96,) do not fit a stream of ",
    ),
    (tr(lambda: m.steer([True, False], v)), "InputError", "layers=[True, False]: True is no number of a layer."),
    (tr(lambda: m.steer(1, v * 1j)), "InputError", "The steering vector is of complex numbers: give one of real ones."),
    (
        tr(lambda: m.layers_output[True]),
        "LayerIndexError",
        "layers_output[True]: layers are counted, 0 to 5, or sliced.",
    ),
    (lambda: m.W_Q[True], "LayerIndexError", "W_Q[True]: layers are counted, 0 to 5, or sliced."),
    (lambda: m.QK(True), "LayerIndexError", "W_Q[True]: the model has 6 layers, 0 to 5."),
    (
        lambda: PHOTO.position_of(True, 0),
        "InputError",
        "position_of(True, 0): give whole numbers, of a row and a column of patches.",
    ),
    (
        lambda: CLIP.position_of(0, True, 0),
        "InputError",
        "position_of(0, True, 0): give whole numbers, of a frame, a row and a column of patches.",
    ),
    (gen_true, "UsageError", "tracer.iter[True]: steps are counted from 0, each once, in rising order."),
    (lambda: m.OV(0)[True], "InputError", "[True]: heads are counted from 0, or sliced."),
    (lambda: m.OV(0)["a"], "InputError", "['a']: heads are counted from 0, or sliced."),
    (
        lambda: m.trace(P, position_ids=5).run(),
        "InputError",
        "position_ids, 5: give a number for each of 5 tokens of 1 prompt, (1, 5).",
    ),
    (
        lambda: m.trace(P, position_ids=torch.arange(3)[None]).run(),
        "InputError",
        "position_ids, of shape (1, 3): give a number for each of 5 tokens of 1 prompt, (1, 5).",
    ),
    (
        lambda: m.trace([P, P], position_ids=torch.arange(15).reshape(3, 5)).run(),
        "InputError",
        "position_ids, of shape (3, 5): give a number for each of 5 tokens of 2 prompts, (2, 5).",
    ),
    (
        lambda: m.trace(inputs_embeds=torch.zeros(1, 4, 96), position_ids="first").run(),
        "InputError",
        "position_ids, 'first': give a number for each of 4 tokens of 1 prompt, (1, 4).",
    ),
    (tr(lambda: m.skip_layer(True)), "LayerIndexError", "skip_layer(True): give the number of a layer, 0 to 5."),
    (
        lambda: m.run_with_cache(P, names_filter="x"),
        "InputError",
        "names_filter=... is TransformerLens's. In its place: names= and layers= of run_with_cache.",
    ),
    (
        lambda: m(P, return_type="logits"),
        "InputError",
        "return_type=... is TransformerLens's. In its place: model(prompt).logits, and model(prompt, labels=ids).loss.",
    ),
    (
        tr(lambda: m.read(["layers_output"])),
        "InputError",
        "['layers_output'] is no name but several: in a trace they are given",
    ),  # type: ignore[arg-type]
    (
        lambda: m.run_with_cache(P, dtype=torch.int32),
        "InputError",
        "dtype=torch.int32: values would lose their fractions. Give one of floating point, such as torch.float16.",
    ),
    (
        lambda: m(P, input_ids=torch.tensor([[5]])),
        "InputError",
        "There are two prompts, the first argument and input_ids=...: give one of them.",
    ),
    (
        lambda: m(P, attention_mask="left"),
        "InputError",
        "attention_mask='left': it is no tensor, nor a list of numbers: ",
    ),
    (
        lambda: m(torch.tensor([[5, 6]]), attention_mask=torch.tensor([[0.5, 1]])),
        "InputError",
        "attention_mask has entries that are negative, fractions or NaN: of two axes it is 1 for tokens and 0 for padding; one ",
    ),
    (
        lambda: m(torch.tensor([[5, 6]]), attention_mask=torch.tensor([[0, -torch.inf]])),
        "InputError",
        "attention_mask has entries that are negative, fractions or NaN: of two axes it is 1 for tokens and 0 for padding; one ",
    ),
    (
        lambda: m.run_with_cache([[5, 6]], positions=0, attention_mask=[[0, 0]]),
        "InputError",
        "positions: prompt 0 has no tokens of its own, all are padding by the attention mask; there is no position 0.",
    ),
    (
        lambda: C.layers_output["1"],
        "CacheError",
        "layers_output['1']: layers are counted, 0 to 5, or sliced. Several: [cache.lay",
    ),  # type: ignore[call-overload]
    (lambda: C["layers_output", [0, 1]], "CacheError", "layers_output[[0, 1]]: layers are counted, 0 to 5, or sliced."),  # type: ignore[index]
    (lambda: C["layers_output", 1, 2], "CacheError", "cache['layers_output', 1, 2]: give a name and a layer, cache['"),  # type: ignore[index]
    (
        lambda: C.stack(["layers_output"]),
        "CacheError",
        "['layers_output'] is not in the cache, which has layers_output: ",
    ),  # type: ignore[arg-type]
    (lambda: C.columns("last"), "InputError", "position='last': it is a whole number."),  # type: ignore[arg-type]
    (
        lambda: ActivationCache.load(D / "cache", StandardizedTransformer("demo:llama", validate=False)),
        "InputError",
        f"{D / 'cache'} has layers_output of a model of 6 layers and width 96, and the model given has 8 layers and width 96: give ",
    ),
    (
        lambda: ActivationCache.load(D / "cache", device="gpu"),
        "InputError",
        "device='gpu': Expected one of cpu, cuda, ",
    ),
    (
        lambda: ActivationCache.load(D / "cache", device="meta"),
        "InputError",
        "device='meta': a file is read onto a device that holds values, such as 'cpu'.",
    ),
    (
        lambda: m.to_string([99999]),
        "InputError",
        "to_string: 99999 is no id of a token of the model, which has 742 of them.",
    ),
    (
        lambda: m.to_string(True),
        "InputError",
        "to_string(True): give ids of tokens; to_tokens(text) makes them of a text.",
    ),
    (
        lambda: m.to_string(torch.tensor([[[5]]])),
        "InputError",
        "to_string: give ids of (seq) or (batch, seq), and not a list of 1 such lists.",
    ),
    (
        lambda: m.to_tokens(torch.tensor([0.5])),
        "InputError",
        "Token ids are integers of shape (seq) or (batch, seq); got torch",
    ),
    (lambda: m.test_prompt(P, " Paris", top=True), "InputError", "top=True: it is a whole number, 1 or more."),
    (
        lambda: m.get_topk_closest_tokens(v, k=True),
        "InputError",
        "k=True: the model has 742 tokens; give how many of them.",
    ),
    (
        lambda: m.project_on_vocab(v.half()),
        "InputError",
        "project_on_vocab: hidden states of torch.float16 do not go through a head whose model has parameters of torch.float32: ",
    ),
    (lambda: m.layers[99], "LayerIndexError", "layers[99]: the model has 6 layers, 0 to 5."),
    (lambda: m.layers["a"], "LayerIndexError", "layers['a']: layers are counted, 0 to 5, or sliced."),  # type: ignore[call-overload]
    (lambda: m.mlps["a"], "LayerIndexError", "mlp of layer 'a': layers are counted, 0 to 5, or sliced."),  # type: ignore[call-overload]
    (
        lambda: m.composition_scores("0", 1, "K"),
        "InputError",
        "Layers '0' and 1: the first is before the second, of 0 to 5.",
    ),  # type: ignore[arg-type]
    (lambda: m.kv_head(True), "LayerIndexError", "kv_head(True): the model has 6 heads, 0 to 5."),
    (lambda: bars(torch.tensor(1.0), labels=["a"]), "InputError", "values are (): give a tensor of (label)."),
    (lambda: curves([0, 1], [1.0, 2.0]), "InputError", "ys is a list: give the values of each curve by its name, {"),  # type: ignore[arg-type]
    (
        lambda: circuit(torch.ones(1, 1), sources=["a"], destinations=["b"], k=1.5),  # type: ignore[arg-type]
        "InputError",
        "k=1.5: give the number of edges to draw, at least 1.",
    ),
    (
        lambda: save_figure(v, D / "x.html"),
        "InputError",
        "figure is a Tensor: give what a plot returns, save(result.plot(), ",
    ),
    (lambda: save_figure(D / "x.html", v), "InputError", "path=a Tensor: give the path of a file to write"),  # type: ignore[arg-type]
    (lambda: LENS.plot(prompt=3), "InputError", "prompt=3: it is of 1 prompt, 0 to 0."),
]


def main() -> None:
    wrong = []
    for ask, kind, text in ROWS:
        try:
            ask()
        except NnatomyError as error:
            frames = traceback.extract_tb(error.__traceback__)
            below = [frame for frame in frames if Path(frame.filename).is_relative_to(LIBRARY)]
            if type(error).__name__ != kind or not str(error).startswith(text):
                wrong.append(f"{type(error).__name__}: {error}, and not {kind}: {text}")
            elif len(below) > 5:
                wrong.append(f"{error}: it is said {len(below)} frames of ours below the user's line")
        except Exception as error:
            wrong.append(f"{type(error).__name__}: {error}, and not {kind}: {text}")
        else:
            wrong.append(f"nothing was raised, and not {kind}: {text}")
    assert len(ROWS) > 140
    assert not wrong, "\n".join(wrong)


if __name__ == "__main__":
    with FILES:
        main()
