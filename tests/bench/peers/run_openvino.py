#!/usr/bin/env python3
"""OpenVINO GenAI: its continuous batching pipeline, called with all rows at once.

Rows find each other's prefixes only if these were computed before the rows were handed over. With `--ahead 1` the first
row therefore runs alone; its time counts.
"""

import openvino_genai as ov

import peer


def main():
    parser = peer.arguments()
    parser.add_argument("--step-tokens", type=int, required=True, help="tokens per step")
    parser.add_argument("--ahead", type=int, default=0, help="rows that run before the others")
    options = parser.parse_args()

    scheduler = ov.SchedulerConfig()
    scheduler.max_num_batched_tokens = options.step_tokens
    scheduler.max_num_seqs = options.sequences
    scheduler.cache_size = 2  # GB
    scheduler.enable_prefix_caching = True
    scheduler.dynamic_split_fuse = True
    settings = {"INFERENCE_NUM_THREADS": options.threads, "PERFORMANCE_HINT": "THROUGHPUT", "NUM_STREAMS": 1}
    engine = ov.ContinuousBatchingPipeline(options.model, scheduler, "CPU", settings)
    tokenizer = engine.get_tokenizer()

    def greedy(max_tokens):
        config = ov.GenerationConfig()
        config.max_new_tokens = max_tokens
        config.ignore_eos = True
        config.do_sample = False
        config.apply_chat_template = False
        return config

    def complete(bodies, ahead=0):
        prompts = [tokenizer.apply_chat_template(body["messages"], add_generation_prompt=True) for body in bodies]
        ids = [tokenizer.encode(prompt, add_special_tokens=False).input_ids for prompt in prompts]
        configs = [greedy(body["max_tokens"]) for body in bodies]
        answers = engine.generate(ids[:ahead], configs[:ahead]) if ahead else []
        answers += engine.generate(ids[ahead:], configs[ahead:])
        outputs = [answer.m_generation_ids[0] for answer in answers]
        return [(tokenizer.decode(out), prompt.shape[1], len(out)) for prompt, out in zip(ids, outputs)]

    complete([{"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}] * 4)
    peer.measure(options, lambda bodies: complete(bodies, options.ahead))


if __name__ == "__main__":
    main()
