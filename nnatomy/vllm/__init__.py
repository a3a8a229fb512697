"""`StandardizedTransformer(id, engine="vllm")`: a model that vLLM runs, under the standard names. It needs vLLM: see docs/vllm.md."""

from nnatomy.vllm.transformer import VllmTransformer as VllmTransformer
