"""Mixture of experts: a channel mixer of which each token uses a few parts."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from common.errors import UserError, check_choice, check_range
from models.channel_mixers import GLU, MLP, relu2
from models.checks import whole
from models.mixer import Scalars
from models.norms import Load
from models.params import normal, param, zeros
from models.partitioning import constrain
from ops import dispatch
from ops.elementwise import activate, gate
from ops.grouped_matmul import grouped_matmul
from ops.projection import project

ROUTERS = ("softmax", "softmax_topk", "sigmoid")
LIMIT = 7.0  # of gpt-oss's hidden units


def clamped_swish(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """x sigmoid(1.702 x) of x cut off at 7, near the GELU (gpt-oss)."""
    x = jnp.minimum(x, LIMIT)
    return x * jax.nn.sigmoid(1.702 * x)


# The function of an expert's hidden units, and whether it is a gate of others.
ACTIVATIONS = {
    "swiglu": (jax.nn.silu, True),
    "geglu": (jax.nn.gelu, True),
    "relu2": (relu2, False),
    "clamped_swiglu": (clamped_swish, True),
}


class MoE(nnx.Module):
    """y = sum over the k experts e of a token of g_e f_e(x), and f_shared(x) of all tokens; f_e(x) = W_3e (a(W_1e x) * W_2e x).

    With logits l = W_r x, in float32 whatever the model computes in:

        softmax       p = softmax(l); the k greatest p, divided by their sum (Mixtral, arXiv 2401.04088; Qwen3)
        softmax_topk  the k greatest of l + b, with a learned b, and the softmax over these k (gpt-oss, arXiv 2508.10925)
        sigmoid       s = sigmoid(l); the experts with the k greatest s + b, and their s divided by their sum. b is for the choice
                      only: no gradient moves it, but after each step b_e += `bias_update` sign(mean load - load of e). With
                      `groups`, only experts of the `top_groups` are chosen whose two greatest s + b have the greatest sum
                      (DeepSeek-V3, arXiv 2412.19437, equations 12 to 16 and section 2.1.2)

    all times `scale`; without `renormalize`, the k are not divided by their sum (Jamba, arXiv 2403.19887). No token is dropped: a
    token's output depends on no other token. Padding has no expert and counts nowhere.

    In training the objective has, of each such layer, two terms. With the N tokens that are no padding, f_e the share of the N k
    choices that fell on expert e, and P_e the mean of p_e (of s_e / sum s, for sigmoid), they are

        balance  E sum_e f_e P_e  >= 1 where f = P  (Switch, arXiv 2101.03961, equation 4), times `balance`
        z        mean (log sum_e exp l_e)^2         (ST-MoE, arXiv 2202.08906, equation 5), times `z_loss`

    Counts are divided by choices, as in DeepSeek's code; transformers divides by tokens, so that its weight is k times less.

    On a mesh, each device sorts and multiplies its own tokens; `mesh.expert` divides rows and the experts' parameters, which are
    gathered where they are used.

    Args:
      experts: E.
      top_k: k, experts of a token.
      hidden: size of an expert; by default such that a token uses as many parameters as in a dense channel mixer.
      activation: "swiglu", "geglu", "relu2" (without W_2), or "clamped_swiglu" (gpt-oss): a(W_1 x) (W_2 x + 1) with
        a(h) = h sigmoid(1.702 h), where W_1 x is cut off above 7 and W_2 x beyond +-7.
      bias: whether the maps of the experts have biases, which a shared expert has not.
      router: "softmax", "softmax_topk" or "sigmoid".
      groups: groups of equally many experts, of the sigmoid router.
      top_groups: groups that a token may choose from.
      scale: factor of the sum over experts.
      renormalize: whether the k weights are divided by their sum.
      shared: size of the expert that all tokens use, in experts; 0 for none.
      shared_hidden: its size itself, where it is no whole number of them.
      shared_gate: whether it is multiplied by sigmoid(w x) (Qwen2-MoE).
      balance: weight of the balance in the objective.
      z_loss: weight of z.
      bias_update: step of the sigmoid router's bias.

    Raises:
      UserError: for an option out of range.
    """

    def __init__(
        self,
        width: int,
        *,
        rngs: nnx.Rngs,
        depth: int = 1,
        expansion: float = 4.0,
        experts: int = 8,
        top_k: int = 2,
        hidden: int | None = None,
        activation: str = "swiglu",
        bias: bool = False,
        router: str = "softmax",
        groups: int = 1,
        top_groups: int = 1,
        scale: float = 1.0,
        renormalize: bool = True,
        shared: int = 0,
        shared_hidden: int | None = None,
        shared_gate: bool = False,
        balance: float = 0.01,
        z_loss: float = 0.0,
        bias_update: float = 0.001,
    ):
        check_choice("model.moe.router", router, ROUTERS)
        check_choice("model.moe.activation", activation, tuple(ACTIVATIONS))
        check_range("model.moe.experts", experts, 1)
        check_range("model.moe.top_k", top_k, 1, experts)
        for key, value in {"shared": shared, "balance": balance, "z_loss": z_loss, "bias_update": bias_update}.items():
            check_range(f"model.moe.{key}", value, 0)
        if groups < 1 or experts % groups or not 1 <= top_groups <= groups or top_k > top_groups * (experts // groups):
            raise UserError(
                f"model.moe.groups={groups} must divide model.moe.experts={experts}, and model.moe.top_groups={top_groups} of "
                f"them must hold model.moe.top_k={top_k} experts"
            )
        if groups > 1 and router != "sigmoid":
            raise UserError(f"model.moe.groups={groups} is for model.moe.router='sigmoid'; leave it at 1")
        if bias_update != 0.001 and router != "sigmoid":
            raise UserError(
                f"model.moe.bias_update={bias_update} is of the bias of model.moe.router='sigmoid'; leave it at 0.001"
            )
        if router == "softmax_topk" and not renormalize:
            raise UserError(
                "model.moe.router='softmax_topk' is a softmax over the choice: leave model.moe.renormalize at True"
            )
        if shared and activation == "clamped_swiglu":
            raise UserError("model.moe.shared is for other activations than 'clamped_swiglu'; set it to 0")
        for key, value in {"shared_gate": shared_gate, "shared_hidden": shared_hidden}.items():
            if value and not shared:
                raise UserError(f"model.moe.{key} is of a shared expert; set model.moe.shared to 1 or more")
        if shared_hidden is not None:
            check_range("model.moe.shared_hidden", shared_hidden, 1)
        self.activation, gated = ACTIVATIONS[activation]
        self.clamped = activation == "clamped_swiglu"
        if hidden is None:
            hidden = whole(expansion * width * (2 / 3 if gated else 1) / (top_k + shared))
        if hidden < 1:
            raise UserError(f"model.moe.hidden must be 1 or more, got {hidden}")
        self.hidden, self.experts, self.top_k, self.router = hidden, experts, top_k, router
        self.groups, self.top_groups, self.scale, self.renormalize = groups, top_groups, scale, renormalize
        self.balance, self.z_loss, self.bias_update = balance, z_loss, bias_update
        used = top_k / experts
        axes, maps = ("expert", "embed", None, "mlp"), 2 if gated else 1
        self.w_router = param(rngs, normal(width**-0.5), (width, experts), ("embed", None), keep_float32=True)
        self.w_in = param(rngs, normal(width**-0.5), (experts, width, maps, hidden), axes, active=used, inputs=(1,))
        output = normal((2 * depth * hidden) ** -0.5)
        self.w_out = param(rngs, output, (experts, hidden, width), ("expert", "mlp", "embed"), active=used, inputs=(1,))
        of_experts = lambda shape, axes: param(rngs, zeros, (experts, *shape), axes, decay=False, active=used)
        self.b_in = of_experts((maps, hidden), ("expert", None, "mlp")) if bias else None
        self.b_out = of_experts((width,), ("expert", None)) if bias else None
        group = "fixed" if router == "sigmoid" else "default"
        has_bias = router != "softmax"
        self.bias = param(rngs, zeros, (experts,), (None,), group=group, keep_float32=True) if has_bias else None
        size = shared * hidden if shared_hidden is None else shared_hidden
        options = {"activation": self.activation, "hidden": size, "depth": depth}
        self.shared = (GLU if gated else MLP)(width, rngs=rngs, **options) if shared else None
        self.w_shared_gate = (
            param(rngs, normal(width**-0.5), (width,), ("embed",), inputs=(0,)) if shared_gate else None
        )

    def __call__(
        self, x: Float[Array, "B T D"], *, segment_ids: Int[Array, "B T"] | None = None, training: bool = False
    ) -> tuple[Float[Array, "B T D"], dict[str, Load], Scalars]:
        """Returns y; and in training what the choice's bias follows, see `models.norms.follow`, and `models.mixer.Scalars`."""
        valid = jnp.ones(x.shape[:2], bool) if segment_ids is None else segment_ids != 0
        x = jnp.where(valid[..., None], x, 0)
        logits = project(x.astype(jnp.float32), self.w_router[...])
        chosen, weights, shares = self.route(logits)
        chosen = jnp.where(valid[..., None], chosen, self.experts)  # none, for padding
        tokens = ("batch", "length", None)
        maps = [p[...].astype(x.dtype) for p in (self.w_in, self.w_out, self.b_in, self.b_out) if p is not None]
        apply = dispatch.local(self._apply, (tokens, tokens, tokens, *((None,) * a.ndim for a in maps)), tokens)
        y = apply(x, chosen, weights, *maps)
        y = constrain(y, "batch", "length", "activation")
        if self.shared is not None:
            common = self.shared(x)
            if self.w_shared_gate is not None:
                common = common * jax.nn.sigmoid(project(x, self.w_shared_gate[..., None]))
            y = y + common
        return (y, *self._seen(logits, chosen, shares, valid)) if training else (y, {}, {})

    def route(
        self, logits: Float[Array, "B T E"]
    ) -> tuple[Int[Array, "B T K"], Float[Array, "B T K"], Float[Array, "B T E"]]:
        """The experts of each token, their weights, and the share of each expert in the token's scores."""
        if self.router == "sigmoid":
            scores = jax.nn.sigmoid(logits)
            choice = jax.lax.stop_gradient(scores + self.bias[...])
            if self.groups > 1:
                grouped = choice.reshape(*choice.shape[:-1], self.groups, -1)
                best = jnp.sum(jax.lax.top_k(grouped, min(2, grouped.shape[-1]))[0], -1)
                last = jax.lax.top_k(best, self.top_groups)[1]
                allowed = jnp.any(jnp.arange(self.groups)[:, None] == last[..., None, :], -1)
                choice = jnp.where(allowed[..., None], grouped, -jnp.inf).reshape(choice.shape)
            chosen = jax.lax.top_k(choice, self.top_k)[1]
            shares = scores / jnp.sum(scores, -1, keepdims=True)
        else:
            logits = logits if self.bias is None else logits + self.bias[...]
            chosen = jax.lax.top_k(jax.lax.stop_gradient(logits), self.top_k)[1]
            scores = shares = jax.nn.softmax(logits)
        weights = jnp.take_along_axis(scores, chosen, -1)
        if self.renormalize:
            weights = self.scale * weights / (jnp.sum(weights, -1, keepdims=True) + 1e-20)
        else:
            weights = self.scale * weights
        return chosen, weights, shares

    def _apply(self, x, chosen, weights, w_in, w_out, b_in=None, b_out=None):
        """The weighted sum of the experts' outputs, of the tokens that are here."""
        choices = chosen.ravel()
        order = jnp.argsort(choices)  # by expert, those of padding behind all
        sizes = jnp.sum(choices[:, None] == jnp.arange(self.experts), 0, dtype=jnp.int32)
        rows = x.reshape(-1, x.shape[-1])[order // self.top_k]
        # The bias of each row's expert; padding has none.
        of_rows = lambda bias: bias.reshape(self.experts, -1).at[choices[order]].get(mode="fill", fill_value=0)
        h = grouped_matmul(rows, w_in.reshape(*w_in.shape[:2], -1), sizes)
        h = h if b_in is None else h + of_rows(b_in)
        if w_in.shape[2] == 2:
            g, v = jnp.split(h, 2, -1)
            h = gate(self.activation, g, jnp.clip(v, -LIMIT, LIMIT) + 1 if self.clamped else v)
        else:
            h = activate(self.activation, h)
        y = grouped_matmul(h, w_out, sizes)
        y = y if b_out is None else y + of_rows(b_out)
        y = y[jnp.argsort(order)].reshape(*chosen.shape, -1)
        return jnp.sum(weights[..., None] * y, -2).astype(x.dtype)

    def _seen(self, logits, chosen, shares, valid: Bool[Array, "B T"]) -> tuple[dict[str, Any], dict[str, Array]]:
        count = jnp.maximum(jnp.sum(valid, dtype=jnp.float32), 1)
        loads = jnp.sum(chosen[..., None] == jnp.arange(self.experts), (0, 1, 2), dtype=jnp.float32)
        mean = lambda a: jnp.sum(jnp.where(valid.reshape(valid.shape + (1,) * (a.ndim - 2)), a, 0), (0, 1)) / count
        balance = self.experts * jnp.sum(loads / (count * self.top_k) * mean(shares))
        z = mean(jnp.square(jax.nn.logsumexp(logits, -1)))
        scalars = {
            "objective": self.balance * balance + self.z_loss * z,
            "moe_balance": balance,
            "moe_z": z,
            "moe_max_load": self.experts * jnp.max(loads) / (count * self.top_k),
        }
        followed = {"bias": Load(loads, jnp.float32(self.bias_update))} if self.router == "sigmoid" else {}
        return followed, scalars
