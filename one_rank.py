"""Mixed precision where one rank holds the whole model, without FSDP2: cast weights and AdamW.

FSDP2 casts all weights before a step and all gradients after it. On several ranks, these casts are
part of gathering and reducing. On one rank they are all that it does: 24 bytes of memory traffic for
each parameter, nearly as much as AdamW. Here AdamW reads the gradients as backward has left them,
and casts each weight while it updates it.

    forward, backward       copies of the weights in bfloat16, and their gradients
    AdamW                   reads and writes float32 weights and moments, and writes the copies
    saving, export          float32 weights
"""
import functools
import math

import torch
from torch import nn
from torch.autograd import Variable

# Compiled kernels move 16 bytes at once where the length of rows is a constant that allows it.
WIDTH = 1024


def runs_without_fsdp(world, zero_stage, offload_optimizer):
    """Return whether CastWeights is used. ZeRO 3 and offload_optimizer need FSDP2, which frees the
    weights in `dtype` between their uses."""
    return world == 1 and zero_stage < 3 and not offload_optimizer


class CastWeights:
    """Copies of a model's float32 parameters in `dtype`, which forward and backward use.

    During forward and backward the modules hold the copies, otherwise the parameters. Gradients are
    in `dtype` after one backward, and summed in float32 after several. AdamW keeps the copies equal
    to the parameters. Other code that changes the parameters has to call `free` first."""

    def __init__(self, model, blocks, dtype, compiled=False):
        """blocks: lists of modules, whose parameters are updated together."""
        self.dtype = dtype
        self.compiled = compiled
        self.block_of = {}  # parameter: index of its block
        for i, block in enumerate(blocks):
            for module in block:
                for parameter in module.parameters():
                    self.block_of[parameter] = i
        self.copies = {}    # parameter: its copy; empty before the first forward and after `free`
        self.places = []    # (module, name, parameter)
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                parameter.grad_dtype = None     # it may have gradients of another dtype
                self.places.append((module, name, parameter))
        model.register_forward_pre_hook(self.insert)
        model.register_forward_hook(self.restore_when_backward_ends)

    def insert(self, *_):
        """Let the modules hold the copies."""
        for module, name, parameter in self.places:
            if parameter not in self.copies:
                self.copies[parameter] = self.cast(parameter)
            setattr(module, name, self.copies[parameter])

    def restore(self):
        """Let the modules hold the float32 parameters."""
        for module, name, parameter in self.places:
            setattr(module, name, parameter)

    def free(self):
        """Restore the parameters, and free the copies, which the next forward makes again."""
        self.restore()
        self.copies.clear()

    def by_block(self, parameters):
        """Return lists of parameters: those of each block, and one of each that is in no block."""
        lists = {}
        for parameter in parameters:
            key = self.block_of.get(parameter, parameter)   # its block, or itself if it is in none
            lists.setdefault(key, []).append(parameter)
        return list(lists.values())

    def cast(self, parameter):
        """Return the copy of a parameter, whose gradient will be the parameter's."""
        copy = nn.Parameter(parameter.detach().to(self.dtype))
        copy.register_post_accumulate_grad_hook(functools.partial(self.pass_gradient, parameter))
        return copy

    def pass_gradient(self, parameter, copy):
        """Give the gradient of a copy to its parameter. Further ones are added in float32."""
        if parameter.grad is None:
            parameter.grad = copy.grad
        else:
            parameter.grad = parameter.grad.float()
            add = compiled_add if self.compiled else add_
            add(as_rows(parameter.grad), as_rows(copy.grad))
        copy.grad = None

    def restore_when_backward_ends(self, model, args, output):
        """Called after forward. Without a backward, the copies stay until `free`."""
        def restore_at_end(grad):
            Variable._execution_engine.queue_callback(self.restore)

        if torch.is_tensor(output) and output.requires_grad:
            output.register_hook(restore_at_end)    # called at the beginning of backward


class AdamW(torch.optim.AdamW):
    """torch's AdamW, whose step can scale the gradients, and writes the copies of CastWeights.

    cast_weights: None where FSDP2 casts the weights."""

    def __init__(self, groups, lr, betas, cast_weights=None):
        super().__init__(groups, lr=lr, betas=betas, fused=True)
        self.cast_weights = cast_weights

    @torch.no_grad()
    def scaled_step(self, factor):
        """Update the weights as step() does, with all gradients times `factor`."""
        if self.cast_weights is not None:
            self.step_and_cast(factor)
            return
        if factor != 1:
            parameters = [p for group in self.param_groups for p in group["params"]]
            gradients = [p.grad for p in parameters if p.grad is not None]
            torch._foreach_mul_(gradients, factor)  # few kernels for all
        self.step()

    def step_and_cast(self, factor):
        """The step for the parameters of CastWeights, in one pass over each.

        Those of a block are updated by one call: the CPU takes longer for a call than the GPU takes
        for a small matrix."""
        steps = [state["step"] for state in self.state.values()]
        step = steps[0].item() + 1
        rows = [update_coefficients(group, step, factor) for group in self.param_groups]
        coefficients_of_groups = torch.tensor(rows).to(steps[0].device, non_blocking=True)
        update = compiled_update if self.cast_weights.compiled else update_
        for group, coefficients in zip(self.param_groups, coefficients_of_groups):
            trained = [parameter for parameter in group["params"] if parameter.grad is not None]
            for parameters in self.cast_weights.by_block(trained):
                update([self.tensors_to_update(p) for p in parameters], coefficients)
        torch._foreach_add_(steps, 1)   # last, while the GPU is still updating

    def tensors_to_update(self, parameter):
        """Return what `update_` takes."""
        copy = self.cast_weights.copies[parameter]
        state = self.state[parameter]
        return (parameter.detach(), copy.detach(), parameter.grad, state["exp_avg"],
                state["exp_avg_sq"])


def as_rows(tensor):
    """Return a view of a tensor with rows of WIDTH, or of the largest number that divides both.

    So one compiled kernel, for any number of rows, serves parameters of nearly all shapes."""
    return tensor.detach().view(-1, math.gcd(tensor.numel(), WIDTH))


def add_(total, gradient):
    """Add a gradient to a total, which may have another dtype, in place."""
    total.add_(gradient)


def update_coefficients(group, step, factor):
    """Return the numbers of an update that depend on the step, as `update_` takes them."""
    beta1, beta2 = group["betas"]
    correction1 = 1 - beta1 ** step
    correction2 = 1 - beta2 ** step
    return [factor, beta1, beta2, group["lr"] * group["weight_decay"],
            group["lr"] / correction1, math.sqrt(correction2), group["eps"]]


def update_(tensors_of_parameters, coefficients):
    """One step of AdamW (arXiv 1711.05101), in place.

    tensors_of_parameters: (weight, copy, gradient, mean, square) of each parameter, five tensors of
    its shape. weight, mean and square, the moments of the gradient, are float32. copy and gradient
    may have another dtype."""
    factor, beta1, beta2, decay, rate, root_correction2, eps = coefficients.unbind()
    for weight, copy, gradient, mean, square in tensors_of_parameters:
        gradient = gradient.float() * factor
        mean.lerp_(gradient, 1 - beta1)
        square.mul_(beta2).add_(gradient * gradient * (1 - beta2))
        denominator = square.sqrt() / root_correction2 + eps
        # As one difference: a factor of 1 - decay would round a decay of 1e-7 to a multiple of 6e-8.
        weight.sub_(decay * weight + rate * mean / denominator)
        copy.copy_(weight)


compiled_add = torch.compile(add_)
# The blocks of most models have the same shapes, so few kernels are compiled.
compiled_update = torch.compile(update_, dynamic=False)
