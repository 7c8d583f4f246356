"""Plans of real models from their configs alone, and their arithmetic on one small enough to count by hand."""

import json

import pytest
import torch
from processes import command
from transformers import AutoModelForCausalLM, DeepseekV3Config, MixtralConfig, Qwen3MoeConfig

from moesparse import Recipe, find_moe_blocks
from moesparse.calibration.plan import file_flops
from moesparse.cli.options import parse_limit
from moesparse.errors import UsageError
from moesparse.pruning.plan import plan_pruning, plan_run
from moesparse.system.speed import gemm_rate
from moesparse.testing import tiny_model
from moesparse.weights.solvers import memory_for_solver

GIB = 2**30
QWEN3_30B = {
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "moe_intermediate_size": 768,
    "vocab_size": 151936,
}


def plan_of(config, **recipe):
    rules = {"weights": "2:4", "saliency": "gated-admm", "update": "least-squares+rescale"}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return plan_pruning(model, find_moe_blocks(model), Recipe(**rules | recipe), windows=128, length=2048, batch_size=8)


# parameters and active ones are those that the models' cards state, in billions (DeepSeek's without its extra
# prediction layer, active ones without the embedding)
@pytest.mark.parametrize(
    ("config", "layers", "blocks", "experts", "billions", "active"),
    [
        (MixtralConfig(), 32, 32, 8, 46.7, 12.7),
        (Qwen3MoeConfig(**QWEN3_30B), 48, 48, 128, 30.5, 3.0),
        (DeepseekV3Config(), 61, 58, 256, 671.0, 36.6),
    ],
    ids=["mixtral-8x7b", "qwen3-30b-a3b", "deepseek-v3"],
)
def test_plans_of_known_models(config, layers, blocks, experts, billions, active):
    plan = plan_of(config, saliency="moe-pruner", update="none")
    assert (plan.layers, plan.blocks, plan.experts) == (layers, blocks, experts)
    assert plan.parameters == pytest.approx(billions * 1e9, rel=0.01)
    assert plan.active_parameters == pytest.approx(active * 1e9, rel=0.04)
    assert plan.weights == pytest.approx(2 * plan.parameters, rel=0.001)
    assert plan.tokens == 262_144
    assert plan.hidden_states == 262_144 * config.hidden_size * 2
    assert plan.layer > plan.weights / layers * 0.9
    assert plan.peak < plan.weights / 4
    # 2:4 in 16 bits: 9 of 16 bits stay
    dense = (
        blocks * experts * 3 * config.hidden_size * getattr(config, "moe_intermediate_size", config.intermediate_size)
    )
    assert plan.packed == pytest.approx(2 * dense * 9 / 16, rel=0.001)
    # H100 at half of its 990 bf16 TFLOP/s: seconds to minutes, never hours
    assert 1 < plan.seconds(5e14) < 3600


def test_second_moments_dominate_the_better_rules():
    simple = plan_of(MixtralConfig(), saliency="moe-pruner", update="none")
    best = plan_of(MixtralConfig())
    assert simple.moments == 0
    assert best.moments == 8 * 8 * (4096**2 + 14336**2)
    assert best.flops["solvers"] > best.flops["forward"] > simple.flops["forward"]


def test_the_peak_does_not_depend_on_the_depth():
    few, many = (plan_of(MixtralConfig(num_hidden_layers=layers)) for layers in (12, 48))
    assert many.weights > 3.5 * few.weights
    assert (few.peak, few.peak_in_memory) == (many.peak, many.peak_in_memory)


def test_solvers_hold_slices_of_what_is_large_and_all_of_what_is_small():
    square, row = 24 * 16**2, 4 * 16
    assert memory_for_solver(2, 8, 16, 3) == 3 * 2 * 8 * 16 + 2 * (square + 17 * 8 * row)
    # beyond what is kept: one expert's copies, and a gibibyte of rows
    E, out, size = 8, 28672, 4096
    each = 24 * size**2 + 5 * 4 * out * size
    held = memory_for_solver(E, out, size, 3) - 3 * E * out * size
    assert each + 1.1 * GIB < held < each + 1.3 * GIB
    assert memory_for_solver(E, out, size, 3, on_gpu=True) > memory_for_solver(E, out, size, 3) + GIB


def test_the_arithmetic_on_a_tiny_model():
    model = tiny_model("mixtral")
    plan = plan_pruning(
        model,
        find_moe_blocks(model),
        Recipe(weights="2:4", saliency="moe-pruner", update="none"),
        windows=3,
        length=10,
        batch_size=2,
    )
    config = model.config
    assert plan.parameters == sum(p.numel() for p in model.parameters())
    assert plan.weights == 4 * plan.parameters
    assert plan.layer == sum(4 * p.numel() for p in model.model.layers[0].parameters())
    assert plan.outside == plan.weights - config.num_hidden_layers * plan.layer
    idle = config.num_local_experts - config.num_experts_per_tok
    experts = config.num_hidden_layers * 3 * config.hidden_size * config.intermediate_size
    embedding = model.get_input_embeddings().weight.numel()
    assert plan.active_parameters == plan.parameters - idle * experts - embedding
    # calibration computes no logits
    head = model.lm_head.weight.numel()
    assert plan.flops["forward"] == 2 * 2 * 30 * (plan.active_parameters - head)
    assert plan.flops["moments"] == plan.flops["solvers"] == 0


def test_a_walk_over_columns_is_counted_once_and_files_as_often_as_they_are_read():
    model = tiny_model("mixtral")
    blocks = find_moe_blocks(model)
    sizes = {"windows": 3, "length": 10, "batch_size": 2}

    def flops(**rules):
        return plan_run(model, blocks, Recipe(**rules), **sizes).flops

    mask = flops(saliency="sparsegpt", update="none")["solvers"]
    both = flops(saliency="sparsegpt", update="obs")["solvers"]
    alone = flops(saliency="moe-pruner", update="obs")["solvers"]
    errors = sum(3 * 2.0 * matrix.weight.numel() * matrix.weight.shape[2] for b in blocks for matrix in b.matrices)
    assert both == pytest.approx(mask + errors)
    assert alone == pytest.approx(both)

    weights = 4 * sum(parameter.numel() for parameter in model.parameters())
    pruned, removed = flops(saliency="magnitude", update="none"), flops(weights=None, experts=0.25, update="none")
    assert pruned["files"] == file_flops(2 * weights, weights)
    assert removed["files"] == pytest.approx(file_flops(3 * weights, 0.75 * weights))
    assert removed["masks"] == removed["solvers"] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_rate_is_that_of_a_product(dtype):
    assert 1e8 < gemm_rate(dtype=dtype) < 1e14


def test_forward_passes_have_a_rate_of_their_own():
    plan = plan_of(MixtralConfig(num_hidden_layers=2), saliency="gated-sparsegpt", update="obs")
    forward, all_of_it = plan.flops["forward"], sum(plan.flops.values())
    assert plan.seconds(1e12) == pytest.approx(all_of_it / 1e12)
    assert plan.seconds(1e12, forward=1e14) == pytest.approx(forward / 1e14 + (all_of_it - forward) / 1e12)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("24GiB", 24 * GIB),
        ("8GB", 8 * 10**9),
        ("1.5 MiB", 1572864),
        ("4096B", 4096),
        ("2kb", 2000),
        ("24G", 24 * 10**9),
        ("3Gi", 3 * GIB),
    ],
)
def test_sizes(text, count):
    assert parse_limit(text) == count


@pytest.mark.parametrize("text", ["many", "-1GB", "GB", "1 parsec", "0", "0GB", "24"])
def test_what_is_no_size(text):
    with pytest.raises(UsageError, match="--max-memory must be"):
        parse_limit(text)


def test_a_number_alone_is_asked_for_its_unit():
    with pytest.raises(UsageError, match=r"must be a size with a unit, such as 24GiB or 24GB, got '24'$"):
        parse_limit("24")
    assert parse_limit("") is None


def test_a_dry_run_needs_config_json_alone(tmp_path):
    MixtralConfig(num_hidden_layers=6).save_pretrained(tmp_path)
    done = command("prune", tmp_path, tmp_path / "out", "--dry-run", "--json").ended_well()
    plan = json.loads(done.stdout)
    assert plan["layers"] == 6
    assert plan["seconds"] > 0
    assert not (tmp_path / "out").exists()


def test_training_holds_one_expert_and_costs_its_tokens():
    """asymmetric+tune of a Mixtral: 65,536 tokens are trained on, and the dense layer stays beside the pruned one."""
    plain = plan_of(MixtralConfig(), update="asymmetric")
    tuned = plan_of(MixtralConfig(), update="asymmetric+tune")
    matrix = 3 * 14336 * 4096
    assert plain.flops["training"] == 0
    assert tuned.flops["training"] == pytest.approx(32 * 2 * matrix * 65536 * 2 * 7.2)
    assert tuned.workspace >= 8 * matrix * 2 + 20 * matrix
    assert {name: count for name, count in tuned.flops.items() if name != "training"} == {
        name: count for name, count in plain.flops.items() if name != "training"
    }
