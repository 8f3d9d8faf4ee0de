"""AugMix' consistency loss (Hendrycks et al., "AugMix: A Simple Data Processing Method …")."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from btrain import precision

_LEAST = 1e-7


def augmix_loss(
    clean_logits: Tensor,
    view1_logits: Tensor,
    view2_logits: Tensor,
    labels: Tensor,
    *,
    jsd_weight: float,
) -> Tensor:
    """Return CE(f(x), y) + weight · JSD(p(x), p(x'), p(x'')), both means over all m examples.

    The Jensen-Shannon divergence is between probabilities, as in AugMix' code (BulletTrain's text
    writes logits), their mixture clamped at 1e-7. An example without views has its clean logits
    in their place: it adds nothing to the divergence and counts in its mean.
    (m, K), (m, K), (m, K), (m,) -> ()
    """
    logits = torch.stack([clean_logits, view1_logits, view2_logits])
    log_p = F.log_softmax(precision.full(logits), dim=2)
    p = log_p.exp()
    log_mixture = p.mean(dim=0).clamp(min=_LEAST).log()
    divergence = (p * (log_p - log_mixture)).sum(dim=2).mean(dim=0)
    return F.nll_loss(log_p[0], labels) + jsd_weight * divergence.mean()
