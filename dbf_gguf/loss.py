"""Losses over a large vocabulary in bounded memory.

The logits of a whole batch are the peak of memory (512 tokens of a 128k vocabulary in float32 are 260 MB, with their
gradient and softmax a gigabyte). So the model body runs once, the head and the loss run over pieces of its output, and
the gradient with respect to the body's output is written down in closed form:

    cross-entropy   ∂/∂logits = softmax(student) − onehot(next token)
    KL(p ‖ q)       ∂/∂logits = softmax(student) − softmax(teacher)

Both are summed over tokens; callers divide.
"""

import torch

PIECE = 256  # tokens whose logits exist at a time


def cross_entropy(hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, gradient: bool = True):
    """Sum of next-token losses of hidden [n, d], head [vocabulary, d], targets [n]; its gradient [n, d] or None."""
    total, grads = 0.0, []
    for h, t in zip(hidden.split(PIECE), targets.split(PIECE), strict=True):
        logits = (h @ head.T).float()
        log_z = logits.logsumexp(dim=1)
        total += (log_z - logits.gather(1, t[:, None])[:, 0]).sum().item()
        if gradient:
            p = logits.sub_(log_z[:, None]).exp_()
            p[torch.arange(len(t), device=t.device), t] -= 1
            grads.append(p.to(head.dtype) @ head)
    return total, torch.cat(grads) if gradient else None


def log_probabilities(hidden: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    """Of every token of the vocabulary after hidden [n, d], float32 [n, vocabulary]."""
    return torch.log_softmax((hidden @ head.T).float(), dim=1)


def kl_divergence(student: torch.Tensor, teacher: torch.Tensor, head: torch.Tensor, gradient: bool = True):
    """Sum over tokens of KL(teacher ‖ student), from hidden states [n, d]; and its gradient for `student` or None."""
    total, grads = 0.0, []
    for s, t in zip(student.split(PIECE), teacher.split(PIECE), strict=True):
        log_q = log_probabilities(s, head)
        log_p = log_probabilities(t, head)
        p = log_p.exp()
        total += torch.dot(p.flatten(), log_p.sub_(log_q).flatten()).item()
        if gradient:
            grads.append(log_q.exp_().sub_(p).to(head.dtype) @ head)
    return total, torch.cat(grads) if gradient else None
