"""A process of vLLM's engine: greedy tokens from each of several folders. Run by test_vllm_engine.py, and by hand:

    python tests/vllm_plugin/generate.py '{"folders": ["out"], "prompts": [[5, 9]], "tokens": 4, "options": {}}'

Prints {"tokens": {folder: [[token, ...] per prompt]}, "native": layers that the compiled kernels ran in this process}
as the last line.
"""

import gc
import json
import sys


def main() -> None:
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    from moesparse_kernels.native_library import Native

    run, native = Native.run_layer, []

    def counted(library, layer):
        native.append(library.path)
        run(library, layer)

    Native.run_layer = counted
    request = json.loads(sys.argv[1])
    prompts = [{"prompt_token_ids": prompt} for prompt in request["prompts"]]
    greedy = SamplingParams(temperature=0, max_tokens=request["tokens"], ignore_eos=True, detokenize=False)
    answers = {}
    for folder in request["folders"]:
        # fp32: in bf16 the two largest logits may round to one value
        llm = LLM(folder, dtype="float32", max_model_len=128, max_num_seqs=4, **request["options"])
        answers[folder] = [list(answer.outputs[0].token_ids) for answer in llm.generate(prompts, greedy)]
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()
    print(json.dumps({"tokens": answers, "native": len(native)}))


if __name__ == "__main__":
    main()
