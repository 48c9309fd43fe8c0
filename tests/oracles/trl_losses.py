"""TRL's losses without a model: its trainers' methods called on a bag of attributes.

The losses live inside trainer classes. The one method that would run the model is replaced by a function
returning the log-probs we pass in, and switches that we do not name are off.
"""

from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import torch
from trl import GRPOTrainer, RLOOTrainer


class Stub:
    """An object on which every attribute that was not set is None."""

    def __init__(self, **attributes):
        self.__dict__.update(attributes)

    def __getattr__(self, name):
        return None


def _accelerator():
    def same(x, reduction=None):
        return x

    return SimpleNamespace(num_processes=1, gather=same, gather_for_metrics=same, reduce=same)


def _stub(logprobs, entropies, **attributes):
    return Stub(
        accelerator=_accelerator(),
        model=SimpleNamespace(training=True),
        _metrics={"train": defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (logprobs, entropies, None),
        **attributes,
    )


def _tensors(**arrays):
    return {name: torch.as_tensor(np.asarray(array, np.float64)) for name, array in arrays.items()}


def grpo(
    logprobs,
    old_logprobs,
    advantages,
    mask,
    ref_logprobs=None,
    *,
    loss_type="grpo",
    beta=0.0,
    epsilon_low=0.2,
    epsilon_high=0.2,
    level="token",
    delta=None,
    bias_correction=False,
    max_length=None,
    sampler_ratio=None,
    entropies=None,
    entropy_coef=0.0,
):
    """Value, gradient by the log-probs, and logged metrics of `GRPOTrainer._compute_loss`."""
    (B, T) = mask.shape
    lp = torch.tensor(logprobs, dtype=torch.float64, requires_grad=True)
    entropy = torch.as_tensor(np.zeros((B, T)) if entropies is None else entropies)
    stub = _stub(
        lp,
        entropy,
        loss_type=loss_type,
        beta=beta,
        epsilon_low=epsilon_low,
        epsilon_high=epsilon_high,
        importance_sampling_level=level,
        top_entropy_quantile=1.0,
        use_vllm=sampler_ratio is not None,
        vllm_importance_sampling_correction=True,
        current_gradient_accumulation_steps=1,
        max_completion_length=T if max_length is None else max_length,
        _entropy_bonus_enabled=entropy_coef != 0,
        entropy_coef=entropy_coef,
        args=SimpleNamespace(delta=delta, use_bias_correction_kl=bias_correction, steps_per_generation=1),
    )
    stub.accelerator.sync_gradients = False
    inputs = {
        "prompt_ids": torch.zeros(B, 1, dtype=torch.long),
        "prompt_mask": torch.ones(B, 1, dtype=torch.long),
        "completion_ids": torch.zeros(B, T, dtype=torch.long),
        **_tensors(completion_mask=mask, advantages=advantages, old_per_token_logps=old_logprobs),
        "num_items_in_batch": torch.as_tensor(float(mask.sum())),
    }
    if ref_logprobs is not None:
        inputs |= _tensors(ref_per_token_logps=ref_logprobs)
    if sampler_ratio is not None:
        inputs |= _tensors(importance_sampling_ratio=sampler_ratio)
    loss = GRPOTrainer._compute_loss(stub, None, inputs)
    loss.backward()
    metrics = {name: values[-1] for name, values in stub._metrics["train"].items()}
    return loss.item(), lp.grad.numpy(), metrics


def rloo(logprobs, old_logprobs, advantages, mask, *, epsilon=0.2):
    """Value and gradient by the log-probs of `RLOOTrainer._compute_loss`; old log-probs are summed for it."""
    (B, T) = mask.shape
    lp = torch.tensor(logprobs, dtype=torch.float64, requires_grad=True)
    stub = _stub(lp, torch.zeros(B, T), epsilon_low=epsilon, epsilon_high=epsilon)
    inputs = {
        "prompt_ids": torch.zeros(B, 1, dtype=torch.long),
        "prompt_mask": torch.ones(B, 1, dtype=torch.long),
        "completion_ids": torch.zeros(B, T, dtype=torch.long),
        **_tensors(completion_mask=mask, advantages=advantages, old_logps=(old_logprobs * mask).sum(1)),
    }
    loss = RLOOTrainer._compute_loss(stub, None, inputs)
    loss.backward()
    return loss.item(), lp.grad.numpy()
