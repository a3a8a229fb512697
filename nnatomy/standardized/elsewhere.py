"""Names that other libraries have for what has another name here: what is said to who asks for one."""

from __future__ import annotations

from typing import NoReturn

#: By hook name of TransformerLens, without its layer, the standard name.
HOOKS = {
    "hook_embed": "token_embeddings",
    "hook_pos_embed": "a module of learned positions",
    "hook_resid_pre": "layers_input",
    "ln1.hook_normalized": "attentions_input",
    "attn.hook_q": "queries",
    "attn.hook_k": "keys",
    "attn.hook_v": "values",
    "attn.hook_rot_q": "queries",
    "attn.hook_rot_k": "keys",
    "attn.hook_attn_scores": "attention_scores",
    "attn.hook_pattern": "attention_probabilities",
    "attn.hook_z": "heads_output",
    "hook_attn_out": "attentions_contribution",
    "hook_resid_mid": "layers_mid",
    "ln2.hook_normalized": "mlps_input",
    "mlp.hook_post": "neurons",
    "hook_mlp_out": "mlps_contribution",
    "hook_resid_post": "layers_output",
    "ln_final.hook_normalized": "ln_final",
}
_OF_TRANSFORMER_LENS = {
    **{hook.split(".")[-1]: f"{name}[i] in a trace" for hook, name in HOOKS.items()},
    "hook_embed": "token_embeddings in a trace",
    "hook_pos_embed": "the output of the module of learned positions: model['transformer.wpe'].output of GPT-2",
    "hook_normalized": "attentions_input[i], mlps_input[i] or ln_final.output in a trace",
    "hook_pre": "mlps_input[i] @ W_in[i] + b_in[i], or W_gate where there is one",
    "hook_result": "heads_output[i] @ W_O[i]",
    "W_pos": "the weight of the module of learned positions: model['transformer.wpe'].module.weight of GPT-2",
    "loss_fn": "torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())",
    "from_pretrained": "StandardizedTransformer(id, folder or model)",
    "from_pretrained_no_processing": "StandardizedTransformer(id, folder or model)",
    "hook_points": "the names of docs/names.md, model.layers_output[i] and kin in a trace",
    "tokens_to_residual_directions": "model.W_U[:, tokens]",
    "accumulated_bias": "model.b_O[layer], model.b_out[layer]",
    "set_use_attn_result": "model.heads_output[i] in a trace, model.W_O[i] for what each head adds",
    "blocks": "layers_output[i] and kin in a trace, or the view layers[i]",
    "cfg": "num_layers, num_heads, hidden_size, vocab_size; the model's own is config",
    "n_layers": "num_layers",
    "n_heads": "num_heads",
    "d_model": "hidden_size",
    "d_vocab": "vocab_size",
    "embed": "token_embeddings in a trace, W_E for the weight",
    "unembed": "project_on_vocab(hidden), W_U for the weight",
    "run_with_hooks": "a trace that assigns: with model.trace(prompt): model.layers_output[5] = ...",
    "add_hook": "model.edit(function), or model.attach(point, module)",
    "add_perma_hook": "model.edit(function), or model.attach(point, module)",
    "reset_hooks": "model.without_edits()",
    "hooks": "model.edit(function)",
    "hook_dict": "docs/from_transformer_lens.md, a table of names",
    "to_single_token": "model.to_tokens(text)",
    "fold_layer_norm": "model.W_Q.folded(layer) and kin, which are new tensors",
    "FactoredMatrix": "model.QK(layer), model.OV(layer)",
}
_OF_NNTERP = {
    "project_on_vocabulary": "model.project_on_vocab(hidden)",
    "model": "model.layers[i] and kin, or the model's own modules by their own names",
}
_OF_NNSIGHT = {
    "generator": "tracer.result in a generation",
    "dispatch": "nothing: the model is loaded",
    "clear_edits": "model.without_edits()",
    "named_modules": "model.paths()",
    "_model": "model.hf_model",
}
#: The room in which scripts of that library run as they stand, and by name what to write here.
ROOMS = {
    ("TransformerLens", "nnatomy.compat.transformer_lens"): _OF_TRANSFORMER_LENS,
    ("nnsight", "nnatomy.compat.nnsight"): _OF_NNSIGHT,
    ("nnterp", "nnatomy.compat.nnterp"): _OF_NNTERP,
}
#: By keyword of TransformerLens's calls of a model, what there is here.
KEYWORDS = {
    "names_filter": "names= and layers= of run_with_cache",
    "pos_slice": "positions= of run_with_cache",
    "remove_batch_dim": "the first row, cache.layers_output[i][0]",
    "incl_bwd": "gradients in a trace: value.retain_grad(), and loss.backward()",
    "return_type": "model(prompt).logits, and model(prompt, labels=ids).loss",
    "stop_at_layer": "a trace whose block asks for model.layers_output[i] and no more: the pass ends there",
    "fwd_hooks": "a trace that assigns: with model.trace(prompt): model.layers_output[5] = ...",
}
#: By name, what to write here.
ELSEWHERE = {name: here for names in ROOMS.values() for name, here in names.items()}


def said_of(name: str) -> str:
    """A sentence on what stands for that name here; "" if it is nobody's."""
    for (library, room), names in ROOMS.items():
        if name in names:
            return f" What {library} calls {name!r} is here: {names[name]}. {room} has its names."
    return ""


class Elsewhere:
    """A name that is asked of the class, too, which has none: the error says what stands for it."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, model: object, owner: type) -> NoReturn:
        raise AttributeError(f"{owner.__name__} has no {self._name}.{said_of(self._name)}")
