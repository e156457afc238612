"""Mixed precision where one rank holds the whole model, without FSDP2: cast weights and AdamW.

FSDP2 casts all weights before a step and all gradients after it. With other ranks this is a part
of gathering and reducing them. On one rank it is 30 bytes of memory traffic for each parameter, as
much as AdamW itself. Here AdamW reads the gradients as backward has left them, and casts each
weight while it updates it.

    forward, backward       copies of the weights in bfloat16, and their gradients
    AdamW                   reads and writes float32 weights and moments, and the copies
    saving, export          float32 weights
"""
import functools
import math

import torch
from torch import nn
from torch.autograd import Variable


class CastWeights:
    """Copies of a model's float32 parameters in `dtype`, which forward and backward use.

    From a forward on, the modules hold the copies. After backward, and after `free`, they hold the
    parameters, which have the gradients. These are in `dtype` after one backward, and float32 sums
    after several."""

    def __init__(self, model, dtype):
        self.dtype = dtype
        self.copies = {}    # parameter: its copy; empty before the first forward and after `free`
        self.places = []    # (module, name, parameter)
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                parameter.grad_dtype = None     # it may have gradients of another dtype
                self.places.append((module, name, parameter))
        model.register_forward_pre_hook(self.insert)
        model.register_forward_hook(self.restore_after_backward)

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
        """Restore the parameters and free the copies: something else may change the parameters."""
        self.restore()
        self.copies.clear()

    def cast(self, parameter):
        """-> the copy of a parameter, whose gradient will be the parameter's."""
        copy = nn.Parameter(parameter.detach().to(self.dtype))
        copy.register_post_accumulate_grad_hook(functools.partial(pass_gradient, parameter))
        return copy

    def restore_after_backward(self, model, args, output):
        """Called after forward: without a backward, the copies stay until `free`."""
        def restore_at_end(grad):
            Variable._execution_engine.queue_callback(self.restore)

        if torch.is_tensor(output) and output.requires_grad:
            output.register_hook(restore_at_end)    # called at the beginning of backward


def pass_gradient(parameter, copy):
    """Add the gradient of a copy to that of its parameter: in float32, if there is one already."""
    if parameter.grad is None:
        parameter.grad = copy.grad
    elif parameter.grad.dtype == copy.dtype:
        parameter.grad = parameter.grad.float().add_(copy.grad)
    else:
        parameter.grad.add_(copy.grad)
    copy.grad = None


class AdamW(torch.optim.AdamW):
    """torch's AdamW, which can clip the gradients, and which writes the copies of CastWeights, too.

    cast_weights: None where FSDP2 casts the weights."""

    def __init__(self, groups, lr, betas, cast_weights=None, compiled=False):
        super().__init__(groups, lr=lr, betas=betas, fused=True)
        self.cast_weights = cast_weights
        self.update = compiled_update if compiled else update

    @torch.no_grad()
    def step_with(self, factor):
        """Update the weights as step() does, with all gradients times `factor`."""
        if self.cast_weights is None:
            if factor != 1:
                torch._foreach_mul_(self.gradients(), factor)   # few kernels for all
            self.step()
            return
        steps = [state["step"] for state in self.state.values()]
        torch._foreach_add_(steps, 1)
        step = steps[0].item()
        for group in self.param_groups:
            coefficients = torch.tensor(
                update_coefficients(group, step, factor), device=steps[0].device)
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                copy = self.cast_weights.copies[parameter]
                state = self.state[parameter]
                tensors = (parameter, copy, parameter.grad, state["exp_avg"], state["exp_avg_sq"])
                # Compiled code moves 16 bytes at once where it knows that rows allow it. One
                # function then serves all parameters but the first, whatever their shapes.
                width = math.gcd(parameter.numel(), 1024)
                rows = [x.detach().view(-1, width) for x in tensors]
                self.update(*rows, coefficients)


    def gradients(self):
        """-> the gradients of all parameters that have one."""
        parameters = [p for group in self.param_groups for p in group["params"]]
        return [p.grad for p in parameters if p.grad is not None]


def update_coefficients(group, step, factor):
    """-> the numbers of an update that depend on the step, as `update` takes them."""
    beta1, beta2 = group["betas"]
    correction1 = 1 - beta1 ** step
    correction2 = 1 - beta2 ** step
    return [factor, beta1, beta2, 1 - group["lr"] * group["weight_decay"],
            group["lr"] / correction1, math.sqrt(correction2), group["eps"]]


def update(weight, copy, gradient, mean, square, coefficients):
    """One step of AdamW (arXiv 1711.05101), in place, for tensors of one shape.

    weight, mean and square, the moments of the gradient, are float32. copy and gradient may have
    another dtype."""
    factor, beta1, beta2, decay, rate, root_correction2, eps = coefficients.unbind()
    gradient = gradient.float() * factor
    mean.lerp_(gradient, 1 - beta1)
    square.mul_(beta2).add_(gradient * gradient * (1 - beta2))
    denominator = square.sqrt() / root_correction2 + eps
    weight.mul_(decay).sub_(rate * mean / denominator)
    copy.copy_(weight)


compiled_update = torch.compile(update)
