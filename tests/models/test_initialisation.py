"""The ranges that the papers state for parameters at initialisation."""

import jax
import numpy as np
import pytest
from flax import nnx

from models import mixer as mixers

WIDTH, LENGTH = 64, 64


def make(name, **hyperparameters):
    return mixers.create(name, WIDTH, rngs=nnx.Rngs(0), **hyperparameters)


def laws(name: str, shape: tuple[int, ...]) -> dict[str, tuple[float, float]]:
    """Mean and deviation that the docstrings or the papers state for random parameters that are no plain maps, by name."""
    uniform = lambda bound: (0.0, bound / 3**0.5)
    taps, map_ = uniform(shape[0] ** -0.5), uniform(shape[0] ** -0.5)
    inner = shape[-1]
    moments = lambda a: (a.mean(), a.std())
    unit = (np.arange(100000) + 0.5) / 100000
    step = np.log(np.geomspace(1e-3, 1e-1, 1001))  # of log-uniform steps, and of the biases whose softplus they are
    bias = np.log(np.expm1(np.exp(step)))
    decays = np.log(np.linspace(1, 16, 1001))
    common = {
        **dict.fromkeys(("conv", "conv_u", "conv_bc", "conv_q", "conv_k", "taps"), taps),
        **dict.fromkeys(("d", "d_k", "omega", "ema_out"), (0.0, 1.0)),
        **dict.fromkeys(("gamma", "bias"), (0.0, 0.02)),
        "log_dt": moments(step),
        "dt_bias": moments(bias),
        "a_log": moments(decays),
        "w_o": (0.0, (2 * np.prod(shape[:-1])) ** -0.5),
    }
    xavier = (0.0, WIDTH**-0.5)
    whole = np.prod(shape[:-1]) ** -0.5
    own = {
        "differential_attention": {"lambdas": (0.0, 0.1)},
        "diag_attention": {"u": (0.0, 1.0), "w_o": xavier, "w_qkv": xavier},
        "norm_attention": {"u": (0.0, 1.0), "w_o": xavier, "w_qkv": (0.0, (2 * WIDTH) ** -0.5)},
        "flash": {"w_o": (0.0, whole)},
        "gated_short_conv": {"w_out": (0.0, whole / 2**0.5)},
        "gau": {"w_o": (0.0, whole)},
        "gss": {
            "c": (0.0, inner**-0.5),
            **dict.fromkeys(("log_a_real", "log_a_imag"), (0.0, 1.0)),
            "w_o": (0.0, whole),
        },
        "h3": {"shift": taps},
        "hyena": {
            "w_out": (0.0, whole / 2**0.5),
            "filter_in": uniform(33**-0.5),
            "filter_in_bias": uniform(33**-0.5),
            "filter_hidden": uniform(WIDTH**-0.5),
            "filter_hidden_bias": uniform(WIDTH**-0.5),
            "filter_out": uniform(WIDTH**-0.5),
        },
        "lact": {
            **dict.fromkeys(("w_0", "w_2"), (0.0, 0.5 * 16**-0.5)),
            **dict.fromkeys(("up_0", "up_2"), (0.0, 0.5 * 32**-0.5)),
            **dict.fromkeys(("w_rate", "w_momentum", "w_s"), (0.0, 0.02)),
            "w_1": (0.0, 16**-0.5),
        },
        "linformer": {"e": (0.0, LENGTH**-0.5)},
        "linoss": {**dict.fromkeys(("a", "s"), (0.5, 12**-0.5)), "b": uniform(WIDTH**-0.5), "c": uniform(WIDTH**-0.5)},
        "lru": {
            "c": (0.0, WIDTH**-0.5),
            "nu_log": moments(np.log(-0.5 * np.log(unit))),
            "theta_log": moments(np.log(2 * np.pi * unit)),
            "gamma_log": moments(0.5 * np.log(unit)),
        },
        "luna": {"p": (0.0, WIDTH**-0.5)},
        "mamba": {"w_dt": map_},
        "mega": {
            "alpha": (0.0, 0.2),
            "delta": (0.0, 0.2),
            **dict.fromkeys(("w_v", "w_m", "w_r", "u_h"), (0.0, 0.02)),
        },
        "mamba3": {"w_out": (0.0, whole / 2**0.5)},
        "mlstm": {"b_i": (0.0, 0.1)}
        | dict.fromkeys(("w_up", "w_qkv"), (0.0, (2 / 5 / WIDTH) ** 0.5))
        | {"w_down": (0.0, 2 * WIDTH**-0.5)},
        "nystromformer": {"conv": (0.0, 33**-0.5)},
        "rwkv_channel_mix": {"w_v": (0.0, whole / 2**0.5)},
        "sinkhorn": {"w_sort": (0.0, 16**-0.5)},
        "slstm": dict.fromkeys(("w_if", "w_zo"), (0.0, (2 / 5 / WIDTH) ** 0.5)),
        "synthesizer": {"r_1": (0.0, (4 * LENGTH) ** -0.5), "r_2": (0.0, (4 * 32) ** -0.5)},
        "titans": {"b_alpha": moments(-np.log(np.geomspace(10, 1000, 1001) - 1))},
        "performer": {"w": (0.0, 1.0)},
        "random_feature_attention": {"directions": (0.0, 1.0)},
        "retnet": {  # Xavier with gain 2^(-5/2), and 2^-1 for the output
            **dict.fromkeys(("w_q", "w_k", "w_v", "w_g"), (0.0, 2**-2.5 * (2 / (WIDTH + np.prod(shape[1:]))) ** 0.5)),
            "w_o": (0.0, 0.5 * (2 / (np.prod(shape[:-1]) + inner)) ** 0.5),
        },
        "rglru": {
            "conv": (0.0, 0.1 / 2),
            **dict.fromkeys(("w_r", "w_i"), (0.0, inner**-0.5)),
            "lambda_": moments(np.log(np.expm1(-0.5 * np.log(np.linspace(0.9**2, 0.999**2, 10001))))),
        },
        "rwkv4": {"w_v": (0.0, WIDTH**-0.5)},
        "rwkv6": {
            **dict.fromkeys(("mix_out", "decay_out"), uniform(0.01)),
            **dict.fromkeys(("w_k", "w_g"), (0.0, 0.1 * WIDTH**-0.5)),
        },
        "rwkv7": {
            "w_k": (0.0, 0.1 * WIDTH**-0.5),
            **dict.fromkeys(("decay_out", "rate_out", "value_out", "gate_out"), (0.0, 0.1 * WIDTH**-0.5)),
        },
        "s4d": {"c": (0.0, 0.5**0.5)},
        "s5": {"b": (0.0, (2 * 256) ** -0.5), "c": (0.0, 256**-0.5)},
        "ttt_linear": {"memory": (0.0, 0.02), "w_lr": (0.0, 0.02)},
        "ttt_mlp": {"memory_in": (0.0, 0.02), "memory_out": (0.0, 0.02), "w_lr": (0.0, 0.02)},
    }
    if name in ("gated_delta_net", "comba", "preconditioned_gated_delta_net"):
        common["a_log"] = moments(np.log(16 * unit))
    return common | own.get(name, {})


@pytest.mark.slow
@pytest.mark.parametrize("name", mixers.names())
def test_spread(name):
    """Every random parameter has the mean and the deviation of the law that is stated: a map's are 0 and fan-in^(-1/2).

    What is built without values has the same parameters."""
    where = {"causal": mixers.find(name).causal, "length": LENGTH, "layer": 1, "layers": 4}
    one, two = (nnx.to_flat_state(nnx.state(mixers.create(name, WIDTH, rngs=nnx.Rngs(i), **where))) for i in (0, 1))
    described = lambda flat: [(path, v.shape, v.dtype, v.get_metadata()) for path, v in flat]
    assert described(one) == described(nnx.to_flat_state(nnx.state(mixers.sketch(name, WIDTH, **where))))
    told = []
    for (path, first), (_, second) in zip(one, two, strict=True):
        a, b = (np.asarray(v[...], np.float64) for v in (first, second))
        if a.size == 0 or np.array_equal(a, b) or (name, str(path[-1])) == ("sgconv", "z"):
            continue  # no draw: a function of channel and layer, or of other parameters
        leaf = str(path[-1])
        fans = [np.prod(a.shape[:i]) for i in range(1, a.ndim)]
        stated = laws(name, a.shape).get(leaf)
        expected = [stated] if stated else [(0.0, fan**-0.5) for fan in fans]
        both = np.stack([a, b])
        rest = 5 / np.sqrt(2 * both.size) + 0.02
        ok = any(
            abs(both.std() / std - 1) < rest and abs(both.mean() - mean) < 5 * std / np.sqrt(both.size)
            for mean, std in expected
        )
        if not ok:
            told.append(f"{leaf}{list(a.shape)}: {both.mean():.4g}, {both.std():.4g}; stated {expected}")
    assert not told


def softplus(x):
    return np.log1p(np.exp(np.asarray(x, np.float64)))


def test_mamba():
    """dt log-uniform in [0.001, 0.1], A = -(1..N), D = 1 (arXiv 2312.00752, section 3.6)."""
    mixer = make("mamba")
    dt = softplus(mixer.dt_bias[...])
    assert dt.min() >= 0.99e-3 and dt.max() <= 0.101
    assert abs(np.log(dt).mean() - np.log(1e-2)) < 0.3  # the middle of the law, on a log scale
    np.testing.assert_allclose(np.exp(mixer.a_log[...]), np.tile(np.arange(1.0, 17.0), (2 * WIDTH, 1)), rtol=1e-6)
    assert (np.asarray(mixer.d[...]) == 1).all()
    assert mixer.w_dt[...].shape[0] == 4 and np.abs(mixer.w_dt[...]).max() <= 4**-0.5


@pytest.mark.parametrize(
    "name,least",
    [("gated_delta_net", 0), ("comba", 0), ("preconditioned_gated_delta_net", 0), ("gated_delta_net_2", 1)],
)
def test_gated_delta_net(name, least):
    """A uniform in (0, 16), or (1, 16), and dt log-uniform in [0.001, 0.1]."""
    mixer = make(name, heads=16)
    a, dt = np.exp(mixer.a_log[...]), softplus(mixer.dt_bias[...])
    assert least < a.min() and a.max() <= 16 and a.std() > 2
    assert dt.min() >= 0.99e-3 and dt.max() <= 0.101


def test_constants():
    """Comba's feedback and correction, the centre of the preconditioner, MesaNet's lambda, Hydra's A and D, Mamba-3's ranks."""
    comba, mesa, hydra, mamba3 = make("comba"), make("mesa_net"), make("hydra", causal=False), make("mamba3", rank=4)
    every = lambda parameter, value: np.testing.assert_allclose(parameter[...], value, rtol=1e-6)
    every(comba.c, 1.0)
    every(comba.d, 1.0)
    every(make("preconditioned_gated_delta_net").center, -0.2)
    np.testing.assert_allclose(0.25 + softplus(mesa.ridge[...]), 1.0, rtol=1e-6)
    every(hydra.a_log, 0.0)
    every(hydra.d, 1.0)
    for parameter, value in ((mamba3.rank_x, 0.25), (mamba3.rank_z, 1.0), (mamba3.rank_o, 0.25)):
        every(parameter, value)


def test_s4d():
    """Re A = -1/2, Im A = pi n (lin), dt log-uniform in [0.001, 0.1], C of unit variance (arXiv 2206.11893)."""
    mixer = make("s4d")
    np.testing.assert_allclose(-np.exp(mixer.log_a_real[...]), -0.5, rtol=1e-6)
    np.testing.assert_allclose(mixer.a_imag[0], np.pi * np.arange(32), rtol=1e-6)
    dt = np.exp(mixer.log_dt[...])
    assert dt.min() >= 0.99e-3 and dt.max() <= 0.101
    c = np.asarray(mixer.c[0, 0]) + 1j * np.asarray(mixer.c[0, 1])
    assert abs(np.mean(np.abs(c) ** 2) - 1) < 0.1


def test_s4d_legs():
    """The eigenvalues of HiPPO-LegS' normal part, from the matrix itself."""
    n = 16
    i = np.arange(n)
    a = -np.where(i[:, None] > i, np.sqrt((2 * i[:, None] + 1) * (2 * i + 1)), np.diag(i + 1.0))
    p = np.sqrt(i + 0.5)
    eigenvalues, vectors = np.linalg.eig(a + np.outer(p, p))
    expected = np.sort(eigenvalues.imag[eigenvalues.imag > 0])
    mixer = make("s4d", state=n, init="legs")
    np.testing.assert_allclose(mixer.a_imag[0], expected, rtol=1e-5)
    np.testing.assert_allclose(eigenvalues.real, -0.5, rtol=1e-6)
    # C B, with C of unit variance and HiPPO's B in the eigenvectors' basis, clipped at 2.
    size = np.minimum(np.abs(vectors.conj().T @ np.sqrt(2 * i + 1)), 2)[eigenvalues.imag > 0]
    size = size[np.argsort(eigenvalues.imag[eigenvalues.imag > 0])]
    c = np.square(np.asarray(mixer.c[0])).sum(0)  # [width, N/2]
    np.testing.assert_allclose(c.mean(0) / size**2, 1, atol=5 / WIDTH**0.5)
    assert abs((c / size**2).mean() - 1) < 0.2


@pytest.mark.parametrize("r_min,r_max", [(0.0, 1.0), (0.9, 0.999)])
def test_lru(r_min, r_max):
    """lambda on the ring, |lambda|^2 uniform; gamma = sqrt(1 - |lambda|^2); B and C of the paper's variances."""
    mixer = make("lru", state=2048, r_min=r_min, r_max=r_max, max_phase=0.5)
    radius = np.exp(-np.exp(np.asarray(mixer.nu_log[...], np.float64)))
    phase = np.exp(np.asarray(mixer.theta_log[...], np.float64))
    assert r_min - 1e-3 <= radius.min() and radius.max() <= r_max + 1e-3
    middle = (r_min**2 + r_max**2) / 2
    assert abs((radius**2).mean() - middle) < 0.03 * (r_max**2 - r_min**2)
    assert 0 <= phase.min() and phase.max() <= 0.5
    np.testing.assert_allclose(np.exp(mixer.gamma_log[...]), np.sqrt(1 - radius**2), rtol=2e-3)
    assert abs(np.var(mixer.b[...]) * 2 * WIDTH - 1) < 0.05
    assert abs(np.var(mixer.c[...]) * 2048 - 1) < 0.05


def test_gau():
    """OffsetScale: gamma ~ N(0, 0.02^2), beta = 0."""
    mixer = make("gau")
    assert abs(np.std(mixer.gamma[...]) - 0.02) < 0.003
    assert not np.asarray(mixer.beta[...]).any()


def test_gla():
    """Keys of half the width, values of the whole, a gate that starts near sigmoid(.)^(1/16): slow decay."""
    mixer = make("gla")
    assert mixer.sizes == (4, 8, 16)
    x = jax.random.normal(jax.random.key(0), (1, 512, WIDTH))
    gate = (x @ mixer.w_decay_in[...]) @ mixer.w_decay_out[...].reshape(16, -1)
    decay = np.asarray(jax.nn.sigmoid(gate)) ** (1 / 16)
    assert 0.9 < decay.mean() < 1


def test_residual_projections_shrink_with_depth():
    """Output projections start smaller in deeper models where the paper (or GPT-2) says so."""
    for name, parameter, power in (("attention", "w_o", 0.5), ("mamba", "w_out", 0.5)):
        shallow = np.std(getattr(make(name, depth=1), parameter)[...])
        deep = np.std(getattr(make(name, depth=16), parameter)[...])
        np.testing.assert_allclose(deep / shallow, 16**-power, rtol=1e-4)
