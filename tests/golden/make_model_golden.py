"""Makes tests/golden/models: one tiny model of random weights per family, as transformers saves it, with what
transformers (f32, eager attention) says of a fixed text.

    pip install torch==2.15.0 transformers==5.23.0 safetensors==0.8.0
    python tests/golden/make_model_golden.py tests/golden/models

Each folder holds config.json, the weights, and expected.json: the versions used, `tokens` (60 ids, longer than every
window and every original context below) and `top` (per position the 8 likeliest next tokens and their log-probabilities
in nats). Weights are large enough for a mistake in any part to show (the default initialisation gives nearly uniform
predictions), and were rounded to the type they are saved in before anything was computed.
"""

import json
import math
import pathlib
import sys

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

N_TOKENS = 60
SMALL = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
LOCAL_AND_GLOBAL = ["sliding_attention", "full_attention", "sliding_attention"]

# name: (model_type, configuration, type of the saved weights, size of a shard)
MODELS = {
    "llama3-rope": (
        "llama",
        dict(
            head_dim=16,
            rope_parameters=dict(
                rope_type="llama3",
                rope_theta=500000.0,
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=32,
            ),
        ),
        torch.float32,
        "1GB",
    ),
    "llama-linear-rope": (
        "llama",
        dict(rope_parameters=dict(rope_type="linear", rope_theta=10000.0, factor=4.0), tie_word_embeddings=True),
        torch.bfloat16,
        "1GB",
    ),
    "mistral": ("mistral", dict(head_dim=16, sliding_window=20), torch.float16, "20KB"),
    "mixtral": (
        "mixtral",
        dict(sliding_window=None, num_local_experts=4, num_experts_per_tok=2, intermediate_size=24),
        torch.float16,
        "1GB",
    ),
    "qwen2": (
        "qwen2",
        dict(tie_word_embeddings=True, use_sliding_window=True, sliding_window=16, max_window_layers=1),
        torch.float32,
        "1GB",
    ),
    "qwen3": ("qwen3", dict(head_dim=16), torch.bfloat16, "1GB"),
    "qwen3-moe": (
        "qwen3_moe",
        dict(head_dim=16, num_experts=6, num_experts_per_tok=3, moe_intermediate_size=16, norm_topk_prob=True),
        torch.float16,
        "1GB",
    ),
    "qwen3-moe-unnormalised": (
        "qwen3_moe",
        dict(head_dim=16, num_experts=6, num_experts_per_tok=3, moe_intermediate_size=16, norm_topk_prob=False),
        torch.bfloat16,
        "1GB",
    ),
    "gemma2": (
        "gemma2",
        dict(
            head_dim=16,
            sliding_window=12,
            query_pre_attn_scalar=24,
            attn_logit_softcapping=4.0,
            final_logit_softcapping=5.0,
            num_hidden_layers=3,
            layer_types=LOCAL_AND_GLOBAL,
        ),
        torch.float16,
        "1GB",
    ),
    "gemma3": (
        "gemma3_text",
        dict(
            head_dim=16,
            sliding_window=12,
            query_pre_attn_scalar=24,
            num_hidden_layers=3,
            layer_types=LOCAL_AND_GLOBAL,
            rope_parameters=dict(
                full_attention=dict(rope_type="linear", rope_theta=1000000.0, factor=8.0),
                sliding_attention=dict(rope_type="default", rope_theta=10000.0),
            ),
        ),
        torch.float32,
        "1GB",
    ),
    "phi3": (
        "phi3",
        dict(
            sliding_window=24,
            original_max_position_embeddings=32,
            rope_parameters=dict(
                rope_type="longrope",
                rope_theta=10000.0,
                short_factor=[1.0, 1.1, 1.2, 1.3],
                long_factor=[1.0, 1.7, 3.1, 5.9],
                original_max_position_embeddings=32,
            ),
        ),
        torch.float16,
        "1GB",
    ),
    "phi3-partial": (
        "phi3",
        dict(
            head_dim=16,
            hidden_size=64,
            intermediate_size=32,
            original_max_position_embeddings=128,
            rope_parameters=dict(
                rope_type="longrope",
                rope_theta=10000.0,
                partial_rotary_factor=0.75,
                short_factor=[1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
                long_factor=[1.0, 1.7, 3.1, 5.9, 7.1, 9.0],
                original_max_position_embeddings=128,
            ),
        ),
        torch.float16,
        "1GB",
    ),
}


def randomise(model, generator):
    """Matrices that keep the size of what goes through them, norms and biases that do something."""
    is_gemma = "gemma" in model.config.model_type
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("bias"):
            value = 0.7 * noise
        elif "norm" in name:
            # gemma adds 1 to its norms' weights when it uses them; others do not.
            value = 0.3 * noise + (0.0 if is_gemma else 1.0)
            # gemma's embeddings are scaled up on their way in but not as the head.
            if is_gemma and name == "model.norm.weight":
                value += 2.0
        elif "embed_tokens" in name or "lm_head" in name:
            value = (0.2 if is_gemma else 0.6) * noise
        else:
            value = noise * (2.0 / math.sqrt(parameter.shape[-1]))
        parameter.data.copy_(value)


def make(name, folder, seed):
    model_type, settings, dtype, shard = MODELS[name]
    config = AutoConfig.for_model(model_type, **{**SMALL, **settings})
    config._attn_implementation = "eager"
    generator = torch.Generator().manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    randomise(model, generator)
    model.tie_weights()
    model = model.to(dtype)
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    model.save_pretrained(folder, max_shard_size=shard)
    (folder / "generation_config.json").unlink(missing_ok=True)
    tokens = torch.randint(3, config.vocab_size, (1, N_TOKENS), generator=generator)
    # What was saved, not what was made: the test reads the same files.
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        logprobs = model(tokens).logits[0].double().log_softmax(-1)
    values, ids = logprobs.topk(8, -1)
    top = [
        [[i, round(p, 6)] for i, p in zip(row_ids, row_values)]
        for row_ids, row_values in zip(ids.tolist(), values.tolist())
    ]
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    expected = dict(versions=versions, tokens=tokens[0].tolist(), top=top)
    (folder / "expected.json").write_text(json.dumps(expected, separators=(",", ":")) + "\n")
    entropy = -(logprobs.exp() * logprobs).sum(-1).mean().item()
    size = sum(f.stat().st_size for f in folder.iterdir())
    print(f"{name}: {size // 1000} kB, mean entropy {entropy:.2f} nats")


if __name__ == "__main__":
    root = pathlib.Path(sys.argv[1])
    for seed, name in enumerate(MODELS):
        make(name, root / name, seed + 1)
