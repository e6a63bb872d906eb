"""The papers' losses as plain float64 readings with whole matrices, written apart from the methods."""

import math

import torch
from torch import Tensor


def unit(x: Tensor) -> Tensor:
    return x / x.pow(2).sum(1, keepdim=True).sqrt()


# The papers' losses of one direction, mean over rows: q, k [B, D] and anchors [K, D] are unit rows; `mask` [B, K]
# says which anchors take part.


def plain_info_nce(q, k, anchors, mask, t):
    logits = torch.cat([(q * k).sum(1, keepdim=True), (q @ anchors.T).masked_fill(~mask, -torch.inf)], 1) / t
    return -logits.log_softmax(1)[:, 0].mean()


def plain_ressl(q, k, anchors, mask, t, t_teacher):
    p = (k @ anchors.T / t_teacher).masked_fill(~mask, -torch.inf).softmax(1)
    log_q = (q @ anchors.T / t).masked_fill(~mask, -torch.inf).log_softmax(1)
    return -(p * log_q.masked_fill(~mask, 0)).sum(1).mean()


def plain_sce(q, k, anchors, mask, t, t_teacher, weight):
    s = (k @ anchors.T / t_teacher).masked_fill(~mask, -torch.inf).softmax(1)
    target = torch.cat([torch.full((len(q), 1), weight, dtype=q.dtype), (1 - weight) * s], 1)
    logits = torch.cat([(q * k).sum(1, keepdim=True), (q @ anchors.T).masked_fill(~mask, -torch.inf)], 1) / t
    log_p = logits.log_softmax(1)
    return -(target * log_p.masked_fill(log_p.isinf(), 0)).sum(1).mean()


def plain_seed(q, k, anchors, mask, t, t_teacher):
    def logits(x, positive):
        return torch.cat([positive[:, None], (x @ anchors.T).masked_fill(~mask, -torch.inf)], 1)

    log_q = (logits(q, (q * k).sum(1)) / t).log_softmax(1)
    p = (logits(k, torch.ones(len(k), dtype=k.dtype)) / t_teacher).softmax(1)
    return -(p * log_q.masked_fill(log_q.isinf(), 0)).sum(1).mean()


def plain_compress(q, k, anchors_q, anchors_k, mask, t, t_teacher):
    """Anchors of the student's space and of the teacher's: the same for one queue."""
    log_p = (k @ anchors_k.T / t_teacher).masked_fill(~mask, -torch.inf).log_softmax(1)
    log_q = (q @ anchors_q.T / t).masked_fill(~mask, -torch.inf).log_softmax(1)
    return (log_p.exp() * (log_p - log_q).masked_fill(~mask, 0)).sum(1).mean()


def plain_co2(q, k, anchors, mask, t):
    log_p, log_q = ((x @ anchors.T / t).masked_fill(~mask, -torch.inf).log_softmax(1) for x in (q, k))
    difference = (log_p - log_q).masked_fill(~mask, 0)
    return ((log_p.exp() - log_q.exp()) * difference).sum(1).mean() / 2


def plain_mean_shift(q, k, anchors, n):
    anchors = torch.cat([anchors[len(k) :], k])  # k has pushed out the oldest
    nearest = (k @ anchors.T).topk(n, 1).indices
    return (q[:, None] - anchors[nearest]).pow(2).sum(2).mean()


def plain_byol(q, k):
    return (2 - 2 * (q * k).sum(1)).mean()


def plain_nt_xent(z_1, z_2, t):
    z = torch.cat([z_1, z_2])
    similarity = (z @ z.T / t).masked_fill(torch.eye(len(z), dtype=torch.bool), -torch.inf)
    positive = torch.arange(len(z)).roll(len(z) // 2)
    return -similarity.log_softmax(1)[torch.arange(len(z)), positive].mean()


def plain_debiased(z_1, z_2, t, prior):
    z = torch.cat([z_1, z_2])
    n, terms = len(z) - 2, []
    for i in range(len(z)):
        positive = (z[i] @ z[(i + len(z_1)) % len(z)] / t).exp()
        others = [j for j in range(len(z)) if j % len(z_1) != i % len(z_1)]
        total = sum((z[i] @ z[j] / t).exp() for j in others)
        negatives = ((total - n * prior * positive) / (1 - prior)).clamp(min=n * math.exp(-1 / t))
        terms.append(-(positive / (positive + negatives)).log())
    return torch.stack(terms).mean()


def plain_fnc(z_1, z_2, support, t, mode, neighbours, threshold):
    z, b = torch.cat([z_1, z_2]), len(z_1)
    terms = []
    for i in range(len(z)):
        views = [v[i % b].detach() for v in (z_1, z_2, *support)]
        others = [j for j in range(len(z)) if j % b != i % b]
        score = {j: max((view @ z[j]).item() for view in views) for j in others}
        best = sorted(others, key=lambda j: -score[j])[:neighbours]
        false = [j for j in best if score[j] > threshold]
        rivals = [j for j in range(len(z)) if j != i and not (mode == "eliminate" and j in false)]
        total = sum((z[i] @ z[j] / t).exp() for j in rivals)
        pulled = [(i + b) % len(z)] + (false if mode == "attract" else [])
        terms.append(sum(-((z[i] @ z[p] / t).exp() / total).log() for p in pulled) / len(pulled))
    return torch.stack(terms).mean()


def plain_nnclr(z, p, anchors, mask, t):
    nearest = anchors[(z @ anchors.T).masked_fill(~mask, -torch.inf).argmax(1)]
    return -(nearest @ p.T / t).log_softmax(1).diagonal().mean()


def plain_barlow_twins(z_1, z_2, weight):
    a, b = ((z - z.mean(0)) / (z.var(0, unbiased=False) + 1e-5).sqrt() for z in (z_1, z_2))
    loss = 0
    for i in range(a.shape[1]):
        for j in range(a.shape[1]):
            c = (a[:, i] * b[:, j]).mean()
            loss = loss + ((1 - c) ** 2 if i == j else weight * c**2)
    return loss


def plain_vicreg(z_1, z_2):
    loss = 25 * (z_1 - z_2).pow(2).mean()
    for z in (z_1, z_2):
        covariance = torch.cov(z.T)
        loss = loss + 25 / 2 * (1 - (covariance.diagonal() + 1e-4).sqrt()).clamp(min=0).mean()
        loss = loss + (covariance - covariance.diagonal().diag()).pow(2).sum() / z.shape[1]
    return loss


def plain_sinkhorn(scores, epsilon, iterations=3):
    """As the paper's listing has it: columns to 1/P, rows to 1/B, in turns; the rows of the result sum to 1."""
    q = (scores / epsilon).exp().T
    q = q / q.sum()
    for _ in range(iterations):
        q = q / q.sum(1, keepdim=True) / q.shape[0]
        q = q / q.sum(0, keepdim=True) / q.shape[1]
    return (q * q.shape[1]).T


def plain_swav(z, prototypes, older, t, epsilon):
    """z: unit embeddings of two views; older: those of the queue, for each of them."""
    scores = [x @ prototypes.T for x in z]
    codes = [
        plain_sinkhorn(torch.cat([s, o @ prototypes.T]).detach(), epsilon)[: len(s)]
        for s, o in zip(scores, older, strict=True)
    ]
    pairs = ((codes[0], scores[1]), (codes[1], scores[0]))
    return sum(-(code * (s / t).log_softmax(1)).sum(1).mean() for code, s in pairs) / 2


def plain_dino(scores, targets, centre, t, t_teacher):
    """Scores of the student for all views and of the teacher for two."""
    terms = []
    for i, target in enumerate(targets):
        p = ((target.detach() - centre) / t_teacher).softmax(1)
        terms += [-(p * (s / t).log_softmax(1)).sum(1).mean() for v, s in enumerate(scores) if v != i]
    return sum(terms) / len(terms)


def plain(name, q, k, h, anchors, mask, symmetric=False):
    """The loss of `name` where the student's projection of view i is x_i = views[i] and the teacher's k_i = k[i];
    h is the predictor, a matrix."""
    q_1, q_2 = (unit(x @ h.T) for x in q)
    k_1, k_2 = (unit(x.detach()) for x in k)
    if name.startswith("moco"):
        t = 0.07 if name == "moco_v1" else 0.2
        loss = plain_info_nce(q_1, k_2, anchors, mask, t)
        return loss + plain_info_nce(q_2, k_1, anchors, mask, t) if symmetric else loss
    if name == "co2":
        return plain_info_nce(q_1, k_2, anchors, mask, 0.2) + 0.3 * plain_co2(q_1, k_2, anchors, mask, 0.05)
    if name == "ressl":
        return plain_ressl(q_1, k_2, anchors, mask, 0.1, 0.04)
    if name == "sce":
        return sum(plain_sce(a, b, anchors, mask, 0.1, 0.07, 0.5) for a, b in ((q_1, k_2), (q_2, k_1))) / 2
    if name == "msf":
        return plain_mean_shift(q_1, k_2, anchors, 5)
    if name == "byol":
        return plain_byol(q_1, k_2) + plain_byol(q_2, k_1)
    if name == "byol_asym":
        return plain_byol(q_1, k_2)
    if name == "simsiam":
        return -((q_1 * unit(q[1].detach())).sum(1) + (q_2 * unit(q[0].detach())).sum(1)).mean() / 2
    return plain_of_a_batch(name, q, (q_1, q_2), anchors, mask)


def plain_of_a_batch(name, z, p, anchors, mask):
    """`plain` for methods whose losses compare the images of the batch: projections z, unit predictions p."""
    if name == "barlow_twins":
        return plain_barlow_twins(*z, 0.0051) / 10
    if name == "vicreg":
        return plain_vicreg(*z)
    if name == "debiased":
        return plain_debiased(unit(z[0]), unit(z[1]), 0.5, 0.1)
    if name == "fnc":
        return plain_fnc(unit(z[0]), unit(z[1]), [unit(x) for x in z[2:]], 0.1, "attract", 10, 0.7)
    if name == "nnclr":
        pairs = ((z[0], p[1]), (z[1], p[0]))
        return sum(plain_nnclr(unit(x), y, anchors, mask, 0.2) for x, y in pairs) / 2
    assert name == "simclr"
    return plain_nt_xent(unit(z[0]), unit(z[1]), 0.5)
