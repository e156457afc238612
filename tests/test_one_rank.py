"""Mixed precision on one rank, without FSDP2: cast weights, their gradients, and AdamW."""
import math

import pytest
import torch
from conftest import assert_close, on_ranks, row, tiny_config, tiny_model
from test_train import metrics_of, run, setup  # noqa: F401

import one_rank
import parallel
from model import Execution, Transformer


def adamw_step(optimizer, parameters, gradients, factor):
    for parameter, gradient in zip(parameters, gradients):
        parameter.grad = (gradient.double() * factor).to(parameter.dtype)
    optimizer.step()


def test_update_is_adamw():
    """Against torch's AdamW in float64, the error is not larger than that of torch in float32."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(64, 48), (1000,), (3,)]
    start = [torch.randn(shape, generator=generator) for shape in shapes]
    settings = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}

    model = torch.nn.ParameterList([x.clone() for x in start])
    block = torch.nn.ParameterList(model[:2])   # updated together, and the third by itself
    cast_weights = one_rank.CastWeights(model, [[block]], torch.bfloat16)
    assert [len(parameters) for parameters in cast_weights.by_block(model)] == [2, 1]
    groups = [{"params": list(model), "weight_decay": 0.1}]
    ours = one_rank.AdamW(groups, 1e-2, (0.9, 0.95), cast_weights)
    truth = [torch.nn.Parameter(x.double()) for x in start]
    plain = [torch.nn.Parameter(x.clone()) for x in start]
    of_truth = torch.optim.AdamW(truth, **settings)
    of_plain = torch.optim.AdamW(plain, **settings)
    for parameter in model:
        ours.state[parameter] = {"step": torch.zeros(()), "exp_avg": torch.zeros_like(parameter),
                                 "exp_avg_sq": torch.zeros_like(parameter)}
    cast_weights.insert()
    cast_weights.restore()

    for factor in (1.0, 0.3, 1.0):
        gradients = [torch.randn(s, generator=generator).bfloat16() for s in shapes]
        for parameter, gradient in zip(model, gradients):
            parameter.grad = gradient
        ours.scaled_step(factor)
        adamw_step(of_truth, truth, gradients, factor)
        adamw_step(of_plain, plain, gradients, factor)

    for parameter, expected, float32 in zip(model, truth, plain, strict=True):
        allowed = 2 * (float32 - expected).abs().max().item()
        assert_close(parameter.double(), expected, "weight", atol=allowed)
        assert torch.equal(cast_weights.copies[parameter], parameter.bfloat16())
        for name in ("exp_avg", "exp_avg_sq"):
            assert_close(ours.state[parameter][name].double(), of_truth.state[expected][name], name,
                         rtol=1e-6, atol=1e-7)
        assert ours.state[parameter]["step"] == 3


def test_a_decay_below_the_rounding_of_one():
    """A decay of 1e-7 a step, of which a float32 factor 1 - decay would make 1.2e-7."""
    start = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    weight = start.clone()
    zeros = torch.zeros_like(weight)
    group = {"lr": 1e-6, "weight_decay": 0.1, "betas": (0.9, 0.95), "eps": 1e-8}
    for step in range(1, 301):
        coefficients = torch.tensor(one_rank.update_coefficients(group, step, 1.0))
        tensors = (weight, weight.bfloat16(), zeros, zeros.clone(), zeros.clone())
        one_rank.update_([tensors], coefficients)
    decayed = start.double().abs().sum() - weight.double().abs().sum()
    exact = start.double().abs().sum() * (1 - (1 - 1e-7) ** 300)
    assert abs(decayed / exact - 1) < 0.08


def gradients_of(zero_stage, rows, execution):
    """Return {name: gradient} of some rows in bfloat16, on one rank."""
    grid = parallel.init(1, 1)
    with torch.device("meta"):
        model = Transformer(tiny_config(tie_word_embeddings=True), None, execution)
    parallel.shard(model, model.block_groups(), grid, torch.bfloat16, zero_stage, False)
    assert (parallel.cast_weights_of(model) is None) == (zero_stage == 3)
    source = tiny_model(tie_word_embeddings=True)
    with torch.no_grad():
        for name, local, _ in model.local_parameters():
            local.copy_(source.get_parameter(name))
    for i, (input_ids, position_ids, cu_seqlens, max_seqlen, labels) in enumerate(rows):
        parallel.set_gradient_sync(model, zero_stage, is_last=i == len(rows) - 1)
        loss = model(input_ids, position_ids, cu_seqlens, max_seqlen, labels)
        loss.backward()
    return {name: parallel.local_rows(p.grad)[0] for name, p in model.named_parameters()}


def compare_gradients(n_rows, execution):
    rows = [row([5, 1, 30, 4], seed=seed) for seed in range(n_rows)]
    cast = gradients_of(2, rows, execution)
    of_fsdp = gradients_of(3, rows, execution)
    for name, gradient in cast.items():
        assert gradient.dtype == (torch.bfloat16 if n_rows == 1 else torch.float32)
        assert torch.equal(gradient.float(), of_fsdp[name]), name


@pytest.mark.parametrize("n_rows", [1, 2, 3])
@pytest.mark.parametrize("execution", [
    Execution(recompute="none"),
    Execution(recompute="all_but_attention", mlp_chunk=7, loss_chunk=9),
    Execution(recompute="all"),
    Execution(recompute="pairs"),
], ids=lambda execution: execution.recompute)
def test_gradients_are_those_of_fsdp(n_rows, execution, tmp_path):
    """Bit for bit: of one row in bfloat16, of several as a float32 sum."""
    on_ranks(1, compare_gradients, n_rows, execution, tmp_path=tmp_path)


def dtypes(model):
    return {p.dtype for p in model.parameters()}


def test_which_weights_the_modules_hold():
    model = tiny_model()
    model.cast_weights = one_rank.CastWeights(model, model.block_groups(), torch.bfloat16)
    parameters = dict(model.named_parameters())
    input_ids, position_ids, cu_seqlens, max_seqlen, labels = row([8, 3])

    loss = model(input_ids, position_ids, cu_seqlens, max_seqlen, labels)
    assert dtypes(model) == {torch.bfloat16}
    loss.backward()
    assert dict(model.named_parameters()).keys() == parameters.keys()
    for name, parameter in model.named_parameters():
        assert parameter is parameters[name]
        assert parameter.dtype == torch.float32 and parameter.grad is not None
    copies = model.cast_weights.copies.values()
    assert all(copy.grad is None for copy in copies)

    # Without a backward, the copies stay until they are freed. New ones are cast from the weights.
    with torch.no_grad():
        before = model(input_ids, position_ids, cu_seqlens, max_seqlen)
        assert dtypes(model) == {torch.bfloat16}
        parallel.free_gathered(model)
        assert dtypes(model) == {torch.float32}
        model.model["norm"].weight.mul_(2)
        after = model(input_ids, position_ids, cu_seqlens, max_seqlen)
    assert torch.equal(after, 2 * before)


def test_a_run_continues_with_and_without_fsdp(setup, tmp_path):  # noqa: F811
    """Checkpoints are the same. The gradients are clipped, and those of three rows are added."""
    settings = {"DTYPE": "bfloat16", "MAX_STEPS": 4, "GLOBAL_BATCH_SIZE": 3, "MAX_GRAD_NORM": 0.5,
                "EVAL_DATA": 0.2, "EVAL_EVERY": 1}
    cast = setup("cast", ZERO_STAGE=2, SAVE_EVERY=2, **settings)
    on_ranks(1, run, cast, tmp_path=tmp_path)
    on_ranks(1, run, setup("fsdp", ZERO_STAGE=3, **settings), tmp_path=tmp_path)
    steps = [line for line in metrics_of(tmp_path / "cast") if "loss" in line]
    assert len(steps) == 4
    assert all(math.isfinite(line["loss"]) and line["grad_norm"] > 0.5 for line in steps)

    checkpoint = str(tmp_path / "cast" / "checkpoints" / "step-00000002")
    for name, zero_stage, rtol in (("goes-on", 2, 0), ("goes-on-with-fsdp", 3, 5e-3)):
        again = setup(name, ZERO_STAGE=zero_stage, RESUME=checkpoint, **settings)
        on_ranks(1, run, again, tmp_path=tmp_path)
        for found, expected in zip(metrics_of(tmp_path / name)[-4:],
                                   metrics_of(tmp_path / "cast")[-4:], strict=True):
            for key in ("loss", "grad_norm", "eval_loss"):
                if key in expected:
                    assert_close(found[key], expected[key], f"{name}: {key}", rtol=rtol)
