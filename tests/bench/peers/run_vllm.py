#!/usr/bin/env python3
"""vLLM on the CPU: one offline `LLM.chat` call with all rows."""

import os

import peer


def main():
    parser = peer.arguments()
    parser.add_argument("--step-tokens", type=int, required=True, help="tokens per step")
    options = parser.parse_args()
    os.environ |= {
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{options.threads - 1}",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_LOGGING_STREAM": "ext://sys.stderr",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    from vllm import LLM, SamplingParams

    engine = LLM(
        model=options.model,
        dtype="bfloat16",
        max_model_len=2048,
        max_num_seqs=options.sequences,
        max_num_batched_tokens=options.step_tokens,
        enable_prefix_caching=True,
        enforce_eager=True,  # compiling takes another minute at every start
        disable_log_stats=True,
    )

    def complete(bodies):
        sampling = [SamplingParams(temperature=0, max_tokens=body["max_tokens"], ignore_eos=True) for body in bodies]
        answers = engine.chat([body["messages"] for body in bodies], sampling, use_tqdm=False)
        return [(a.outputs[0].text, len(a.prompt_token_ids), len(a.outputs[0].token_ids)) for a in answers]

    complete([{"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}] * 4)
    engine.reset_prefix_cache()
    peer.measure(options, complete)


if __name__ == "__main__":
    main()
