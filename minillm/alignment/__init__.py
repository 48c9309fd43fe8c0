"""Alignment: policies, rollouts with a verifiable reward, supervised fine-tuning and GRPO."""

from minillm.alignment.grpo import GRPO, GRPOConfig
from minillm.alignment.policy import (
    Accuracy,
    PolicySize,
    accuracy,
    fresh_policy,
    frozen_copy,
    response_logits,
    response_logprobs,
)
from minillm.alignment.rollout import Rollout, roll_out, roll_out_live
from minillm.alignment.sft import SFT, SFTConfig, new_sft

__all__ = [
    "GRPO",
    "SFT",
    "Accuracy",
    "GRPOConfig",
    "PolicySize",
    "Rollout",
    "SFTConfig",
    "accuracy",
    "fresh_policy",
    "frozen_copy",
    "new_sft",
    "response_logits",
    "response_logprobs",
    "roll_out",
    "roll_out_live",
]
