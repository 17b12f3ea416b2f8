"""The Llama block written out in loops, beside which model.py is tested."""

import math

import torch


def reference_llama(model, tokens):
    """Llama, written out: loops over heads and positions, one softmax at a time. tokens (T,) ->
    logits (T, V)"""
    w, c = model.state_dict(), model.config
    group, hd = c.n_head // c.n_kv_head, c.head_dim

    def norm(x, weight):
        return x / (x.pow(2).mean() + c.norm_eps).sqrt() * weight

    def turn(x, position):  # rotate-half: i is paired with i + hd/2
        out = x.clone()
        for i in range(hd // 2):
            angle = position * c.rope_theta ** (-2 * i / hd)
            out[i] = x[i] * math.cos(angle) - x[i + hd // 2] * math.sin(angle)
            out[i + hd // 2] = x[i + hd // 2] * math.cos(angle) + x[i] * math.sin(angle)
        return out

    def project(x, layer, name, heads, position=None):                # one (hd,) vector a head
        name = f"{layer}.self_attn.{name}"
        out = (w[f"{name}_proj.weight"] @ x + w.get(f"{name}_proj.bias", 0)).view(heads, hd)
        if position is None:
            return out
        if c.qk_norm:
            out = [norm(head, w[f"{name}_norm.weight"]) for head in out]
        return [turn(head, position) for head in out]

    xs = [w["embed_tokens.weight"][t] for t in tokens]
    for layer in (f"layers.{i}" for i in range(c.n_layer)):
        inputs = [norm(x, w[f"{layer}.input_layernorm.weight"]) for x in xs]
        queries = [project(x, layer, "q", c.n_head, t) for t, x in enumerate(inputs)]
        keys = [project(x, layer, "k", c.n_kv_head, t) for t, x in enumerate(inputs)]
        values = [project(x, layer, "v", c.n_kv_head) for x in inputs]
        for t in range(len(xs)):
            heads = []
            for h in range(c.n_head):
                q, kv = queries[t][h], h // group
                scores = torch.stack([q @ keys[s][kv] for s in range(t + 1)]) / math.sqrt(hd)
                heads.append(sum(p * values[s][kv] for s, p in enumerate(scores.softmax(0))))
            xs[t] = xs[t] + w[f"{layer}.self_attn.o_proj.weight"] @ torch.cat(heads)
            x = norm(xs[t], w[f"{layer}.post_attention_layernorm.weight"])
            gate, up = w[f"{layer}.mlp.gate_proj.weight"] @ x, w[f"{layer}.mlp.up_proj.weight"] @ x
            xs[t] = xs[t] + w[f"{layer}.mlp.down_proj.weight"] @ (gate * gate.sigmoid() * up)
    return torch.stack([w["lm_head.weight"] @ norm(x, w["norm.weight"]) for x in xs])
