"""A contrastive step of transformers' PaliGemma in PyTorch, written the way it usually is: padded batches, one forward
pass over all items, last token pooled, torch's own loss, clipping and AdamW."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from transformers import PaliGemmaConfig, PaliGemmaModel

from benchmarks.train_step import weights
from benchmarks.train_step.batches import BOS, EOS, Padded
from jfe_jax.config import Config
from jfe_jax.models.paligemma.hf_config import paligemma_config_json


class Step:
    """Model, temperature and optimizer of a run; `step(batch)` takes one step.

    With bfloat16, weights and gradients of the model are bfloat16, as under DeepSpeed or FSDP, and the optimizer keeps
    float32 weights and moments: faster than autocast, which leaves the residual stream in float32.

    Args:
      config: of our run: model, loss and optimizer settings are taken from it; the learning rate is constant.
      shapes: of our parameters, see `weights.into_torch`.
      checkpointing: layers are computed again in the backward pass.
      compiled: through torch.compile.
    """

    def __init__(
        self, config: Config, shapes: dict[str, tuple[int, ...]], checkpointing: bool = False, compiled: bool = False
    ):
        self.config, self.device = config, "cuda" if torch.cuda.is_available() else "cpu"
        settings = paligemma_config_json(config.model, {"bos": BOS, "eos": EOS, "pad": 0})
        with torch.device(self.device):
            self.model = PaliGemmaModel(PaliGemmaConfig(**settings)).float().eval()
        # What decides the mask, whatever the config says: every token attends to every token.
        self.model.config.text_config.is_causal = False
        weights.into_torch(self.model, shapes)
        if checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
            # The towers look at their own flag; the model as a whole would ask for what only generation needs.
            self.model.language_model.train()
            self.model.vision_tower.train()
        self.own = list(self.model.parameters())
        self.masters = self.own
        if config.model.dtype == "bfloat16":
            self.masters = [torch.nn.Parameter(parameter.detach().clone()) for parameter in self.own]
            self.model.to(torch.bfloat16)
        self.log_scale = torch.nn.Parameter(torch.tensor(config.loss.temperature, device=self.device).log().neg())
        self.optimizer = self._optimizer()
        self.loss: Callable[..., torch.Tensor] = torch.compile(self._loss, dynamic=True) if compiled else self._loss

    def put(self, batch: Padded) -> dict[str, torch.Tensor]:
        """A batch on the device."""
        tensors = {name: torch.from_numpy(value) for name, value in vars(batch).items()}
        return {name: tensor.to(self.device, non_blocking=True) for name, tensor in tensors.items()}

    def step(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss, and the norm of the gradients before clipping."""
        loss = self.loss(batch)
        loss.backward()
        if self.masters is not self.own:
            for master, parameter in zip(self.masters, self.own, strict=True):
                master.grad, parameter.grad = parameter.grad.float(), None
        norm = torch.nn.utils.clip_grad_norm_([*self.masters, self.log_scale], self.config.optimizer.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.masters is not self.own:
            with torch.no_grad():
                torch._foreach_copy_(self.own, self.masters)
        return loss.detach(), norm

    def wait(self) -> None:
        """Until the last step is done, its update included."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def peak(self) -> int:
        """Bytes of the device's memory, at most until now; 0 where nobody counts them."""
        return torch.cuda.max_memory_allocated() if self.device == "cuda" else 0

    def name(self) -> str:
        """The device's."""
        return torch.cuda.get_device_name() if self.device == "cuda" else "cpu"

    def _loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        pixels = batch["pixels"].to(self.own[0].dtype)
        states = self.model(
            input_ids=batch["tokens"],
            attention_mask=batch["mask"],
            pixel_values=pixels if len(pixels) else None,
            use_cache=False,
        ).last_hidden_state
        last = states[torch.arange(len(states), device=states.device), batch["lengths"] - 1]
        queries, candidates = F.normalize(last.float(), dim=-1).chunk(2)
        logits = self.log_scale.exp() * queries @ candidates.T
        target = torch.arange(len(logits), device=logits.device)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    def _optimizer(self) -> torch.optim.Optimizer:
        settings = self.config.optimizer
        # Biases and norms, which are not decayed, are torch's parameters of one axis.
        groups = [
            {"params": [p for p in self.masters if p.ndim > 1], "weight_decay": settings.weight_decay},
            {"params": [*(p for p in self.masters if p.ndim == 1), self.log_scale], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(
            groups, lr=settings.learning_rate, betas=(settings.b1, settings.b2), eps=1e-8, fused=True
        )
