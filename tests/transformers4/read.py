"""Run by transformers 4: load FOLDER, print its config and what loading says as JSON, write the logits to OUT."""

import json
import sys

import torch
import transformers

transformers.logging.set_verbosity_error()
model, loading = transformers.AutoModelForCausalLM.from_pretrained(
    sys.argv[1], output_loading_info=True, torch_dtype=torch.float32
)
with torch.no_grad():
    torch.save(model.eval()(torch.arange(3, 60)[None]).logits, sys.argv[2])
config = model.config.to_dict()
config.pop("_name_or_path", None)
config.pop("moesparse", None)
counts = {what: len(loading[f"{what}_keys"]) for what in ("missing", "unexpected", "mismatched")}
print(json.dumps({"version": transformers.__version__, "config": config, "loading": counts}, default=str))
