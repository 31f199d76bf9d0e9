"""The snippets of docs/lti.md, as they stand."""

import re

import pytest
import torch
import torch.nn.functional as F

from tests.tiny import ROOT

SNIPPETS = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs/lti.md").read_text(), re.MULTILINE | re.DOTALL)
SIZES = {"d": 8, "e": 16, "n": 16, "r": 1, "taps": 4, "vocab": 11, "depth": 2}


def mamba_file():
    """A small file with the names and shapes of state-spaces' mamba-130m."""
    d, e, n, r, taps, vocab, depth = SIZES.values()
    torch.manual_seed(0)
    weights = {"backbone.embedding.weight": torch.randn(vocab, d)}
    for i in range(depth):
        block, mixer = f"backbone.layers.{i}", f"backbone.layers.{i}.mixer"
        weights |= {
            f"{mixer}.A_log": torch.arange(1, n + 1.0).log().repeat(e, 1) + 0.1 * torch.randn(e, n),
            f"{mixer}.D": 1 + 0.1 * torch.randn(e),
            f"{mixer}.in_proj.weight": torch.randn(2 * e, d) / d**0.5,
            f"{mixer}.conv1d.weight": torch.randn(e, 1, taps) / 2,
            f"{mixer}.conv1d.bias": 0.1 * torch.randn(e),
            f"{mixer}.x_proj.weight": torch.randn(r + 2 * n, e) / e**0.5,
            f"{mixer}.dt_proj.weight": torch.randn(e, r),
            f"{mixer}.dt_proj.bias": torch.randn(e) - 2,
            f"{mixer}.out_proj.weight": torch.randn(d, e) / e**0.5,
            f"{block}.norm.weight": 1 + 0.1 * torch.randn(d),
        }
    weights["backbone.norm_f.weight"] = 1 + 0.1 * torch.randn(d)
    return weights | {"lm_head.weight": weights["backbone.embedding.weight"]}


def rms(x, weight):
    return x / (x.square().mean() + 1e-5).sqrt() * weight


def decode(weights, tokens):
    """The logits of each token of one sequence, by Mamba's recurrence in float64."""
    w = {name.removeprefix("backbone."): tensor.double() for name, tensor in weights.items()}
    _, e, n, r, taps, _, depth = SIZES.values()
    seen = [[torch.zeros(e, dtype=torch.float64)] * taps for _ in range(depth)]
    states = [torch.zeros(e, n, dtype=torch.float64) for _ in range(depth)]
    logits = []
    for token in tokens:
        x = w["embedding.weight"][token]
        for i in range(depth):
            p = {name.split("mixer.")[1]: tensor for name, tensor in w.items() if name.startswith(f"layers.{i}.mixer")}
            h, z = (p["in_proj.weight"] @ rms(x, w[f"layers.{i}.norm.weight"])).chunk(2)
            seen[i] = [*seen[i][1:], h]
            h = F.silu((torch.stack(seen[i], 1) * p["conv1d.weight"][:, 0]).sum(1) + p["conv1d.bias"])
            dt, B, C = (p["x_proj.weight"] @ h).split([r, n, n])
            dt = F.softplus(p["dt_proj.weight"] @ dt + p["dt_proj.bias"]).unsqueeze(1)
            states[i] = torch.exp(-dt * p["A_log"].exp()) * states[i] + dt * h.unsqueeze(1) * B
            x = x + p["out_proj.weight"] @ ((states[i] @ C + p["D"] * h) * F.silu(z))
        logits.append(w["lm_head.weight"] @ rms(x, w["norm_f.weight"]))
    return torch.stack(logits)


def test_a_mamba_language_model_is_read_and_decodes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    weights = mamba_file()
    torch.save(weights, "pytorch_model.bin")
    found = {}
    exec(SNIPPETS[-1], found)
    tokens = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
    outputs, states = [], [None] * SIZES["depth"]
    with torch.no_grad():
        for piece in tokens.split([5, 1, 2], dim=1):
            logits, states = found["model"].step(piece, states)
            outputs.append(logits)
    want = decode(weights, tokens[0].tolist())
    assert ((torch.cat(outputs, 1)[0] - want).abs().max() / want.abs().max()).item() < 1e-5
    prompt = [1, 2, 3]
    for _ in range(4):
        prompt.append(decode(weights, prompt)[-1].argmax().item())
    assert found["tokens"].item() == prompt[-1]


@pytest.mark.parametrize("snippet", SNIPPETS[:-1])
def test_models_of_the_page(snippet):
    exec(snippet.replace('("vim', '("test_vim').replace("test_vim_tiny", "test_vim").replace("s4d_tiny", "s4d"), {})
