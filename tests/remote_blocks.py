"""Blocks as users write them, each a function of a model that returns tensors; and all methods of `nnatomy.methods`."""

from __future__ import annotations

import copy
import io
import traceback
from collections.abc import Callable
from typing import Any

import einops
import numpy as np
import torch
import torch.nn.functional as F

import nnatomy.methods as M

P = "The capital of France is"
P2 = "The capital of Japan is"
BLOCKS: dict[str, Callable[[Any], dict[str, torch.Tensor]]] = {}


def block(f: Any) -> Any:
    BLOCKS[f.__name__] = f
    return f


@block
def reads(model: Any) -> Any:
    n = model.num_layers
    with model.trace(P):
        ids = model.input_ids
        emb = model.token_embeddings
        q = model.queries[1]
        p = model.attention_probabilities[1]
        z = model.heads_output[1]
        a = model.attentions_output[1]
        mid = model.layers_mid[1]
        mi = model.mlps_input[1]
        ne = model.neurons[1]
        mc = model.mlps_contribution[1]
        h = model.layers_output[n - 1]
        lg = model.logits
    return {
        "emb": emb,
        "q": q,
        "p": p,
        "z": z,
        "a": a,
        "mid": mid,
        "mi": mi,
        "ne": ne,
        "mc": mc,
        "h": h,
        "lg": lg,
        "ids": ids,
    }


@block
def names_of_the_model(model: Any) -> Any:
    own = "transformer.h" if "GPT2" in type(model.hf_model).__name__ else "model.layers"
    with model.trace(P) as tracer:
        x = model[own + ".2"].input
        y = model.layers[2].mlp.output
        w = model.ln_final.output
        out = tracer.result.logits
    return {"x": x, "y": y, "w": w, "out": out}


@block
def in_place(model: Any) -> Any:
    v = torch.linspace(-1, 1, model.hidden_size)
    with model.trace([P, P2]):
        h = model.layers_output[2]
        h[:, -1] += v
        h[0, 1] = 0
        h[1].mul_(1.5)
        lg = model.logits
    return {"h": h, "lg": lg}


@block
def assignment(model: Any) -> Any:
    with model.trace(P):
        model.mlps_output[3] = 0 * model.mlps_output[3]
        model.attention_probabilities[4] = model.attention_probabilities[4].roll(1, -1)
        lg = model.logits
    return {"lg": lg}


@block
def assign_local_tensor(model: Any) -> Any:
    torch.manual_seed(3)
    x = torch.randn(1, 5, model.hidden_size)
    with model.trace(P):
        model.layers_output[2] = x
        lg = model.logits
    return {"lg": lg}


@block
def branch_on_item(model: Any) -> Any:
    taken = []
    with model.trace(P):
        for i in range(model.num_layers):
            h = model.layers_output[i]
            if h[0, -1].norm().item() > 12 + i:
                h[0, -1] *= 0.5
                taken.append(i)
            elif (h[0, -1] > 0).sum() > 40:
                h[0, -1, :10] = 0
                taken.append(-i)
        lg = model.logits
    return {"lg": lg, "taken": torch.tensor(taken)}


@block
def loop_over_layers(model: Any) -> Any:
    found, norms = [], []
    with model.trace(P):
        for i in range(model.num_layers):
            h = model.layers_output[i]
            found.append(h[0, -1])
            norms.append(h.norm(dim=-1))
    return {"found": torch.stack(found), "norms": torch.stack(norms)}


@block
def a_slice(model: Any) -> Any:
    with model.trace(P):
        all_ = model.layers_output[:]
    return {"all": torch.stack(all_)}


@block
def steering(model: Any) -> Any:
    v = torch.linspace(-3, 3, model.hidden_size)
    with model.trace([P, P2]):
        model.steer([1, 3], v, factor=2.0, token_positions=-1)
        lg = model.logits
    return {"lg": lg}


@block
def functions(model: Any) -> Any:
    torch.manual_seed(0)
    w, b = torch.randn(7, model.hidden_size), torch.randn(7)
    with model.trace([P, P2]):
        h = model.layers_output[2]
        p = model.attention_probabilities[3]
        s = h.softmax(-1)
        top = h.topk(5, dim=-1)
        e = torch.einsum("bsd,btd->bst", h, h)
        r = einops.rearrange(h, "b s d -> (b s) d")
        m = einops.reduce(h, "b s d -> b d", "mean")
        ein = einops.einsum(p, h, "b h q k, b k d -> b h q d")
        lin = F.linear(h, w, b)
        st = torch.stack([h[0, -1], torch.ones(model.hidden_size)])
        c = torch.cat([h[:, :1], torch.zeros(2, 2, model.hidden_size)], 1)
        sd = h.std(0), h.var(-1, unbiased=False)
        n = F.normalize(h, dim=-1)
        ln = F.layer_norm(h, (model.hidden_size,))
        ge = F.gelu(h, approximate="tanh")
        co = F.cosine_similarity(h[0], h[1], dim=-1)
        at = F.scaled_dot_product_attention(h[:, None], h[:, None], h[:, None])
        cr = F.cross_entropy(h[0], torch.tensor([1, 2, 3, 4, 0]))
        u, ss, vh = torch.linalg.svd(h[0], full_matrices=False)
        mm = h @ h.transpose(-1, -2)
        ma = h @ w.T
        wh = torch.where(h > 0, h, 0.1)
        cs = h.cumsum(1)
        srt = h.sort(-1, descending=True).values
        ga = h.gather(-1, torch.arange(3).expand(2, 5, 3))
        lse = h.logsumexp(-1)
        mx = h.max(-1)
    return {
        "s": s,
        "tv": top.values,
        "ti": top.indices,
        "e": e,
        "r": r,
        "m": m,
        "ein": ein,
        "lin": lin,
        "st": st,
        "c": c,
        "sd": sd[0],
        "va": sd[1],
        "n": n,
        "ln": ln,
        "ge": ge,
        "co": co,
        "at": at,
        "cr": cr,
        "ss": ss,
        "u": u,
        "mm": mm,
        "ma": ma,
        "wh": wh,
        "cs": cs,
        "srt": srt,
        "ga": ga,
        "lse": lse,
        "mx": mx.values,
    }


@block
def masks_and_indices(model: Any) -> Any:
    with model.trace([P, "Hello there my dear old friend, how are you"]):
        mask = model.attention_mask.bool()
        h = model.layers_output[2]
        a = h[mask]
        b = h[h[..., 0] > 0]
        h[~mask] = 0
        c = h[torch.arange(2), torch.tensor([-1, -2])]
        d = torch.masked_select(h, h > 1)
        e = (h > 2).nonzero()
        h.masked_fill_(h > 3, 3.0)
        lg = model.logits
    return {"a": a, "b": b, "c": c, "d": d, "e": e, "lg": lg}


@block
def values_here(model: Any) -> Any:
    with model.trace(P):
        h = model.layers_output[2]
        text = f"{h[0, -1, 0].item():.4f} {float(h.detach().mean()):.5f} {bool((h > 0).any())} {int(h.argmax())}"
        array = h[0].detach().numpy()
        listed = h[0, -1, :3].tolist()
        same = torch.equal(h, h.clone()), torch.allclose(h, h + 1e-9)
        row = [x.sum() for x in h[0]]
        back = np.asarray(h[0, -1].detach())
        shape, size, dtype, device = h.shape, h.size(1), h.dtype, str(h.device)
    assert array.dtype == np.float32
    assert len(listed) == 3
    return {
        "array": torch.from_numpy(array.copy()),
        "listed": torch.tensor(listed),
        "row": torch.stack(row),
        "back": torch.tensor(back),
        "text": torch.tensor([ord(c) for c in text + str(same) + str(shape) + str(size) + str(dtype) + device]),
    }


@block
def fill_a_local_buffer(model: Any) -> Any:
    buffer = torch.empty(model.num_layers, model.hidden_size)
    with model.trace(P):
        for i in range(model.num_layers):
            buffer[i] = model.layers_output[i][0, -1]
    return {"buffer": buffer}


@block
def logit_lens_by_hand(model: Any) -> Any:
    rows = []
    with model.trace(P):
        for i in range(model.num_layers):
            h = model.layers_output[i]
            rows.append(model.lm_head(model.ln_final(h[:, -1])).softmax(-1))
    return {"rows": torch.stack(rows)}


@block
def project(model: Any) -> Any:
    with model.trace(P):
        h = model.layers_output[2]
        x = model.project_on_vocab(h)
    after = model.project_on_vocab(h[:, -1])
    return {"x": x, "after": after}


@block
def a_weight(model: Any) -> Any:
    with model.trace(P):
        h = model.layers_output[2]
        w = model.lm_head.module.weight
        x = h[0, -1] @ w[:10].T
        y = h[0, -1] @ model.lm_head.module.weight[model.tokenizer.encode(" Paris")[0]] if model.tokenizer else x
    return {"x": x, "y": y}


@block
def two_traces(model: Any) -> Any:
    with model.trace(P):
        clean = model.layers_output[3]
    with model.trace(P2):
        h = model.layers_output[3]
        h[:, -1] = clean[:, -1]
        lg = model.logits
    return {"lg": lg}


@block
def skip(model: Any) -> Any:
    with model.trace(P):
        model.skip_layers(2, 3)
        lg = model.logits
    return {"lg": lg}


@block
def generation(model: Any) -> Any:
    kinds, norms = [], []
    with model.generate(P, max_new_tokens=5, do_sample=False) as tracer:
        for step in tracer.iter[:]:
            h = model.layers_output[3]
            norms.append(h[:, -1].norm())
            if step == 2:
                h[:, -1] *= 1.5
            kinds.append(model.logits[0, -1].argmax())
        out = tracer.result
    return {"kinds": torch.stack(kinds), "out": out, "norms": torch.stack(norms)}


@block
def generation_sampled(model: Any) -> Any:
    torch.manual_seed(5)
    with model.generate([P, "Hello"], max_new_tokens=6, do_sample=True, top_k=20) as tracer:
        out = tracer.result
    return {"out": out}


@block
def gradients(model: Any) -> Any:
    with model.trace(P):
        h = model.layers_output[2]
        h.retain_grad()
        lg = model.logits
        lg[0, -1, 5].backward()
        g = h.grad
    return {"g": g}


@block
def gradients_asked(model: Any) -> Any:
    with model.trace([P, P2]):
        h1, h2 = model.layers_output[1], model.layers_output[3]
        value = (model.logits[:, -1, 5] - model.logits[:, -1, 7]).sum()
        a, b = torch.autograd.grad(value, [h1, h2])
    return {"a": a, "b": b}


@block
def gradient_of_a_local_vector(model: Any) -> Any:
    v = torch.zeros(model.hidden_size, requires_grad=True)
    w = torch.full((model.hidden_size,), 0.5, requires_grad=True)
    optimizer = torch.optim.Adam([v, w], lr=0.1)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        with model.trace(P):
            h = model.layers_output[2]
            model.layers_output[2] = h + (v * w + v)
            loss = F.cross_entropy(model.logits[:, -1], torch.tensor([11]))
        loss.backward()
        losses.append(loss.detach())
        optimizer.step()
    return {"v": v.detach(), "w": w.detach(), "losses": torch.stack(losses)}


@block
def no_grad_inside(model: Any) -> Any:
    with torch.no_grad():
        with model.trace(P):
            h = model.layers_output[2]
            rg = h.requires_grad
            lg = model.logits
    with model.trace(P):
        k = model.layers_output[2]
        d = k.detach() * 2
    return {"h": h, "lg": lg, "rg": torch.tensor([rg, k.requires_grad, d.requires_grad])}


@block
def out_of_order(model: Any) -> Any:
    try:
        with model.trace(P):
            model.layers_output[3]
            model.layers_output[1]
    except Exception as e:
        mine = [f.lineno for f in traceback.extract_tb(e.__traceback__) if f.filename == __file__]
        return {"t": torch.tensor([ord(c) for c in type(e).__name__ + str(e)] + [mine[-1]])}


@block
def exception(model: Any) -> Any:
    try:
        with model.trace(P):
            h = model.layers_output[3]
            1 / 0
    except ZeroDivisionError:
        ok = 1
    with model.trace(P):
        lg = model.logits
    return {"h": h, "lg": lg, "ok": torch.tensor(ok)}


@block
def wrong_shape(model: Any) -> Any:
    texts = []
    for f in (lambda h: h + torch.ones(7), lambda h: h.view(3, 3), lambda h: h[0, 99], lambda h: h @ h):
        try:
            with model.trace(P):
                f(model.layers_output[3])
        except Exception as e:
            texts.append(type(e).__name__)
    try:
        with model.trace(P):
            model.layers_output[3] = torch.zeros(2, 2)
    except Exception as e:
        texts.append(type(e).__name__ + str(e))
    return {"t": torch.tensor([ord(c) for c in "".join(texts)])}


@block
def source_values(model: Any) -> Any:
    with model.trace(P):
        x = (
            model.layers[2].source.add.output
            if "GPT2" not in type(model.hf_model).__name__
            else model.layers[2].mlp.output
        )
    return {"x": x}


@block
def caches(model: Any) -> Any:
    with model.trace(P) as tracer:
        cache = tracer.cache([layer.mlp for layer in model.layers])
    return {"all": torch.stack([cache[layer.mlp.path][0].output for layer in model.layers])}


@block
def lasting_edit(model: Any) -> Any:
    def edit() -> None:
        model.mlps_output[2] = model.mlps_output[2] * 0.5

    edited = model.edit(edit)
    with edited.trace(P):
        lg = edited.logits
    return {"lg": lg}


@block
def attached(model: Any) -> Any:
    torch.manual_seed(1)
    sae = torch.nn.Sequential(
        torch.nn.Linear(model.hidden_size, 32), torch.nn.ReLU(), torch.nn.Linear(32, model.hidden_size)
    )
    spliced = model.attach("layers_output[2]", sae, name="sae", how="error")
    with torch.no_grad(), spliced.trace(P):
        f = spliced.sae[1].output
        f[..., 0] = 5.0
        lg = spliced.logits
    return {"f": f, "lg": lg}


@block
def invoked(model: Any) -> Any:
    with torch.no_grad(), model.trace() as tracer:
        with tracer.invoke(P):
            a = model.layers_output[2][:, -1]
        with tracer.invoke("Hello there, the capital of Japan is"):
            h = model.layers_output[2]
            h[:, -1] = a
            lg = model.logits[:, -1]
    return {"a": a, "lg": lg}


@block
def random_numbers(model: Any) -> Any:
    torch.manual_seed(7)
    with model.trace(P):
        h = model.layers_output[2]
        noise = torch.randn_like(h)
        h += 0.1 * noise
        drop = F.dropout(h, 0.5)
        pick = torch.multinomial(model.logits[0, -1].softmax(-1), 3)
    return {"noise": noise, "drop": drop, "pick": pick}


@block
def after_the_block(model: Any) -> Any:
    with model.trace(P):
        h, lg = model.layers_output[2], model.logits
    loss = F.cross_entropy(lg[0, :-1], torch.tensor([1, 2, 3, 4]))
    best = lg[0, -1].argmax(-1)
    h2 = h.cpu().float().to(torch.float64).mean(1)
    buffer = io.BytesIO()
    torch.save(h, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer)
    return {"loss": loss, "best": best, "h2": h2, "loaded": loaded, "copied": copy.deepcopy(h.detach())}


A, B = "The capital of France is", "The capital of Japan is"
PAIR = [A, B, "The capital of Italy is", "Hello, my name is"]


def methods(model: Any) -> dict[str, Callable[[], Any]]:
    found: dict[str, Callable[[], Any]] = {}
    if model is None:  # for the names alone
        met, n = None, 0
    else:
        met, n = M.logit_difference(" Paris", " Tokyo", model), model.num_layers
    pair = {"clean": A, "corrupted": B, "metric": met}
    found["logit_lens last"] = lambda: M.logit_lens(model, PAIR)
    found["logit_lens all+inv"] = lambda: M.logit_lens(model, PAIR, positions="all", return_inv_logits=True)
    found["lens_statistics"] = lambda: M.lens_statistics(model, A, targets=" Paris")
    found["collect_activations"] = lambda: M.collect_activations(model, PAIR, points=["layers_output", "mlps_output"])
    found["token_activations"] = lambda: M.get_token_activations(model, [A, B], layers=[2, 4])
    found["activation_patching"] = lambda: M.activation_patching(model, **pair)
    found["activation_patching heads"] = lambda: M.activation_patching(
        model, **pair, point="heads_output", heads="each"
    )
    found["head_scores"] = lambda: M.head_scores(model, PAIR)
    found["head_scores random"] = lambda: M.head_scores(model, seed=3)
    found["head_ablation"] = lambda: M.head_ablation(model, [A, B], metric=met, how="mean")
    found["path_patching"] = lambda: M.path_patching(
        model,
        clean=A,
        corrupted=B,
        sender=[f"mlps_contribution[{i}]" for i in range(n)],
        receivers="logits",
        metric=met,
    )
    found["causal_tracing"] = lambda: M.causal_tracing(model, A, subject="France", metric=met, samples=4)
    found["direct_logit_attribution"] = lambda: M.direct_logit_attribution(model, A, answer=" Paris")
    found["dla by head"] = lambda: M.direct_logit_attribution(model, A, answer=" Paris", by="head")
    found["attribution_patching"] = lambda: M.attribution_patching(model, **pair)
    found["attribution_patching grad_drop"] = lambda: M.attribution_patching(model, **pair, grad_drop=True)
    found["integrated_gradients"] = lambda: M.integrated_gradients(model, clean=A, corrupted=B, metric=met, steps=3)
    found["edge_attribution"] = lambda: M.edge_attribution(model, A, B, metric=met, steps=2)
    found["circuit_faithfulness"] = lambda: M.circuit_faithfulness(
        model, A, B, metric=met, attribution=M.edge_attribution(model, A, B, metric=met), sizes=[0, 16]
    )
    found["SteeringVector"] = lambda: M.SteeringVector.from_prompts(model, [A, B], ["Hello", "My name"])
    found["ablate_direction"] = lambda: ablated(model)
    found["patchscope_lens"] = lambda: M.patchscope_lens(
        model, [A, B], M.TargetPrompt("The capital of Spain is", index_to_patch=3)
    )
    found["patchscope_generate"] = lambda: M.patchscope_generate(
        model, A, M.TargetPrompt("The capital of Spain", index_to_patch=-1), max_length=2, layers=[0, 2]
    )
    found["run_prompts"] = lambda: M.run_prompts(
        model, [M.Prompt.from_strings(x, {"t": "Paris"}, model) for x in PAIR], tqdm=None
    )
    found["TunedLens.train"] = lambda: M.TunedLens.train(
        model, ["The capital of France is Paris.", "Japan is in Asia."], steps=3
    )
    found["fingerprint"] = lambda: [
        torch.tensor(
            [
                ord(c)
                for c in __import__("nnatomy.methods.activation_store", fromlist=["x"]).fingerprint(model)["weights"]
            ]
        )
    ]
    return found


def ablated(model: Any) -> Any:
    d = torch.linspace(-1, 1, model.hidden_size)
    edited = model.edit(lambda: M.ablate_direction(model, d))
    with edited.trace(A):
        return edited.layers_output[3]


def leaves(value: Any, depth: int = 0) -> list[torch.Tensor]:
    """All tensors in what a method returns, here."""
    if isinstance(value, torch.Tensor):
        return [value.local() if hasattr(value, "local") else value.detach()]
    if isinstance(value, dict):
        return [one for each in value.values() for one in leaves(each, depth + 1)]
    if isinstance(value, (list, tuple)):
        return [one for each in value for one in leaves(each, depth + 1)]
    if depth < 4 and hasattr(value, "__dict__") and not isinstance(value, type):
        return [one for key, each in vars(value).items() if key != "model" for one in leaves(each, depth + 1)]
    return []
