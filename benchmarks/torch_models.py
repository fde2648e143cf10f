"""Language models in PyTorch of the shapes that ours have, with the mixers that others offer: peers for `benchmarks.steps`.

Each is a worker of `benchmarks.workers`, and told by JSON what to be:

    python -m benchmarks.torch_models decode '{"kind": "mamba", "width": 64, "depth": 2, "prompt": 8, "batch": 1}'
"""

import json
import os
import warnings

from benchmarks import peers
from benchmarks.workers import serve
from common import command

HEADS = 4


def training_step(kind: str, width: int, depth: int, length: int, batch: int, mode: str):
    """A training step of AdamW on random bytes: (facts, call)."""
    import torch
    import torch.nn.functional as F
    from torch import nn

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    torch.manual_seed(0)

    class Norm(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(width))

        def forward(self, x):
            return F.rms_norm(x, (x.shape[-1],), self.weight, 1e-6)

    class SwiGLU(nn.Module):
        def __init__(self):
            super().__init__()
            hidden = int(width * 8 / 3)
            self.w_in = nn.Linear(width, 2 * hidden, bias=False)
            self.w_out = nn.Linear(hidden, width, bias=False)

        def forward(self, x):
            gate, value = self.w_in(x).chunk(2, -1)
            return self.w_out(F.silu(gate) * value)

    linear = lambda inputs, outputs, bias=False: nn.Linear(inputs, outputs, bias=bias)
    size = width // HEADS
    angle = torch.arange(length)[:, None] * 10000.0 ** (-torch.arange(0, size, 2) / size)
    cos, sin = angle.cos(), angle.sin()

    def rotate(x):  # [B, H, T, K]
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    heads = lambda x: x.view(batch, length, HEADS, -1)

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.out = linear(width, 3 * width), linear(width, width)

        def forward(self, x):
            q, k, v = (heads(a).transpose(1, 2) for a in self.qkv(x).chunk(3, -1))
            y = F.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
            return self.out(y.transpose(1, 2).reshape(batch, length, -1))

    class GLA(nn.Module):
        """fla's plain functions; the chunked one has one decay for each head, which is an easier problem."""

        def __init__(self, chunked):
            super().__init__()
            self.chunked = chunked
            self.q, self.k = linear(width, width // 2), linear(width, width // 2)
            self.v, self.g, self.out = (linear(width, width) for _ in range(3))
            self.decay = nn.Sequential(linear(width, 16), linear(16, width // 2, True))
            self.norm = Norm(size)

        def forward(self, x):
            q, k, v, g = (heads(f(x)) for f in (self.q, self.k, self.v, self.decay))
            g = F.logsigmoid(g) / 16
            if self.chunked:
                y = peers.fla("ops/simple_gla/naive.py", "naive_chunk_simple_gla")(q, k, v, g[..., 0])[0]
            else:
                y = peers.fla("ops/gla/naive.py", "naive_recurrent_gla")(q, k, v, g)[0]
            return self.out((self.norm(y) * F.silu(heads(self.g(x)))).reshape(batch, length, -1))

    class RetNet(nn.Module):
        def __init__(self, chunked):
            super().__init__()
            self.chunked = chunked
            self.q, self.k, self.v = linear(width, width), linear(width, width), linear(width, 2 * width)
            self.g, self.out, self.norm = linear(width, 2 * width), linear(2 * width, width), Norm(2 * size)

        def forward(self, x):
            q, k, v = (heads(f(x)).transpose(1, 2) for f in (self.q, self.k, self.v))
            q, k = rotate(q), rotate(k)
            if self.chunked:
                g = torch.log(1 - 2.0 ** (-5 - torch.arange(HEADS))).expand(batch, length, HEADS)
                function = peers.fla("ops/simple_gla/naive.py", "naive_chunk_simple_gla")
                y = function(*(a.transpose(1, 2) for a in (q, k, v)), g)[0]
            else:
                y = peers.fla("ops/retention/naive.py", "naive_retention")(q, k, v).transpose(1, 2)
            return self.out((self.norm(y) * F.silu(heads(self.g(x)))).reshape(batch, length, -1))

    class S4D(nn.Module):
        """The plain form: the kernel from its poles, and a convolution by Fourier transforms."""

        def __init__(self, state=64):
            super().__init__()
            n = state // 2
            self.log_dt = nn.Parameter(torch.empty(width).uniform_(-6.9, -2.3))
            self.c = nn.Parameter(torch.randn(width, n, 2))
            self.log_a = nn.Parameter(torch.full((width, n), -0.69))
            self.imag = nn.Parameter(torch.pi * torch.arange(n).repeat(width, 1))
            self.d = nn.Parameter(torch.ones(width))
            self.out = linear(width, 2 * width)

        def forward(self, x):
            dt = self.log_dt.exp()[:, None]
            a = torch.complex(-self.log_a.exp(), self.imag)
            c = torch.view_as_complex(self.c) * (torch.exp(a * dt) - 1) / a
            powers = torch.exp((a * dt)[..., None] * torch.arange(length))
            kernel = 2 * torch.einsum("dn,dnt->dt", c, powers).real
            u = x.float().transpose(1, 2)
            y = torch.fft.irfft(torch.fft.rfft(u, 2 * length) * torch.fft.rfft(kernel, 2 * length), 2 * length)
            y = F.gelu(y[..., :length] + self.d[:, None] * u).transpose(1, 2)
            value, gate = self.out(y.to(x.dtype)).chunk(2, -1)
            return value * gate.sigmoid()

    def transformers_mixer(kind):
        if kind.startswith("mamba"):
            from transformers import MambaConfig
            from transformers.models.mamba.modeling_mamba import MambaMixer

            options = {"use_mambapy": kind == "mamba_mambapy", "use_associative_scan": False}
            return MambaMixer(MambaConfig(hidden_size=width, num_hidden_layers=1, **options), 0)
        if kind == "gated_delta_net":
            from transformers import Qwen3NextConfig
            from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

            config = Qwen3NextConfig(
                hidden_size=width,
                linear_num_value_heads=HEADS,
                linear_num_key_heads=HEADS,
                linear_key_head_dim=size * 3 // 4,
                linear_value_head_dim=size * 3 // 2,
                num_hidden_layers=1,
            )
            return Qwen3NextGatedDeltaNet(config, 0)
        from transformers import RwkvConfig
        from transformers.models.rwkv.modeling_rwkv import RwkvSelfAttention

        mixer = RwkvSelfAttention(RwkvConfig(hidden_size=width, num_hidden_layers=1), 0)
        for parameter in mixer.parameters():
            if not parameter.isfinite().all() or parameter.ndim != 2:
                nn.init.uniform_(parameter, 0, 1)
        return mixer

    own = {
        "attention": Attention,
        "gla_recurrent": lambda: GLA(False),
        "gla_chunked": lambda: GLA(True),
        "retnet_parallel": lambda: RetNet(False),
        "retnet_chunked": lambda: RetNet(True),
        "s4d": S4D,
    }
    make = own.get(kind, lambda: transformers_mixer(kind))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(256, width)
            nn.init.normal_(self.embedding.weight, std=0.02)
            self.mixers = nn.ModuleList(make() for _ in range(depth))
            mamba = kind.startswith("mamba")  # it takes the place of the channel mixer
            self.channel_mixers = nn.ModuleList(() if mamba else (SwiGLU() for _ in range(depth)))
            self.norms = nn.ModuleList(Norm(width) for _ in range(len(self.mixers) + len(self.channel_mixers) + 1))

        def forward(self, ids, targets):
            x = self.embedding(ids)
            norms = iter(self.norms)
            for i, mixer in enumerate(self.mixers):
                y = mixer(next(norms)(x))
                x = x + (y[0] if isinstance(y, tuple) else y)
                if self.channel_mixers:
                    x = x + self.channel_mixers[i](next(norms)(x))
            logits = next(norms)(x) @ self.embedding.weight.T
            return F.cross_entropy(logits.view(-1, 256).float(), targets.view(-1))

    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    function = torch.compile(model) if mode == "compile" else model
    ids, targets = torch.randint(256, (2, batch, length))

    def call(number):
        for _ in range(number):
            with torch.autocast("cpu", torch.bfloat16, enabled=mode == "bf16"):
                loss = function(ids, targets)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        assert loss.isfinite()

    return {"parameters": sum(p.numel() for p in model.parameters())}, call


def decoding(kind: str, width: int, depth: int, prompt: int, batch: int):
    """Decoding with transformers: (facts, call); a call is a number of new tokens after a prompt that was read before."""
    import torch
    import transformers

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    ends = {"bos_token_id": 0, "eos_token_id": None, "pad_token_id": 0}
    shape = {"vocab_size": 256, "hidden_size": width, "num_hidden_layers": depth} | ends
    if kind == "attention":
        config = transformers.LlamaConfig(
            **shape,
            intermediate_size=int(width * 8 / 3),
            num_attention_heads=HEADS,
            max_position_embeddings=1 << 16,
            tie_word_embeddings=True,
        )
        model = transformers.LlamaForCausalLM(config)
    elif kind == "mamba":
        model = transformers.MambaForCausalLM(transformers.MambaConfig(**shape))
    else:
        model = transformers.RwkvForCausalLM(transformers.RwkvConfig(**shape, attention_hidden_size=width))
    model.eval()
    key = {"attention": "past_key_values", "mamba": "cache_params", "rwkv4": "state"}[kind]

    @torch.no_grad()
    def forward(ids, cache, start):
        where = {"cache_position": torch.arange(start, start + ids.shape[1])} if kind == "mamba" else {}
        out = model(ids, use_cache=True, **({} if cache is None else {key: cache}), **where)
        token = torch.multinomial(torch.softmax(out.logits[:, -1] / 0.8, -1), 1)
        return token, getattr(out, key)

    token, cache = forward(torch.randint(256, (batch, prompt)), None, 0)
    place = prompt

    def call(number):
        nonlocal token, cache, place
        for _ in range(number):
            token, cache = forward(token, cache, place)
            place += 1

    return {"parameters": sum(p.numel() for p in model.parameters())}, call


def main(arguments: list[str]) -> None:
    parser = command.Parser(__doc__)
    parser.add_argument("what", choices=("step", "decode"))
    parser.add_argument("options", type=json.loads, help="of the program, as JSON")
    chosen = parser.parse_args(arguments)
    warnings.filterwarnings("ignore")
    serve(*{"step": training_step, "decode": decoding}[chosen.what](**chosen.options))


if __name__ == "__main__":
    command.run(main)
