"""Losses over a large vocabulary in bounded memory.

The logits of a whole batch are the peak of memory (512 tokens of a 128k vocabulary in float32 are 260 MB, with their
gradient and softmax a gigabyte). So the model body runs once, the head and the loss run over pieces of its output, and
the gradient with respect to the body's output is written down in closed form:

    cross-entropy   ∂/∂logits = softmax(student) − onehot(next token)
    KL(p ‖ q)       ∂/∂logits = softmax(student) − softmax(teacher)

Both are summed over tokens; callers divide. On a CPU the vocabulary is cut into pieces too, so that temporaries are
small: only log-probabilities are kept whole, and a KL with its gradient takes some 0.8 times as long.
"""

import torch

PIECE = 256  # tokens whose logits exist at a time
VOCABULARY_PIECE = 2048  # on a CPU

Pieces = list[torch.Tensor]  # float32 [n, piece of the vocabulary] each


def cross_entropy(hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, gradient: bool = True):
    """Sum of next-token losses of hidden [n, d], head [vocabulary, d], targets [n]; its gradient [n, d] or None."""
    total, gradients = 0.0, []
    for h, t in zip(hidden.split(PIECE), targets.split(PIECE), strict=True):
        rest = []
        for log_q, begin in zip(log_probabilities(h, head), range(0, len(head), _piece(head)), strict=True):
            here = ((t >= begin) & (t < begin + log_q.shape[1])).nonzero()[:, 0]
            place = here, t[here] - begin
            total -= log_q[place].sum().item()
            if gradient:
                log_q.exp_()[place] -= 1
                rest.append(log_q)
        if gradient:
            gradients.append(_times(rest, head))
    return total, torch.cat(gradients) if gradient else None


def kl_divergence(student: torch.Tensor, teacher: torch.Tensor, head: torch.Tensor, gradient: bool = True):
    """Sum over tokens of KL(teacher ‖ student), from hidden states [n, d]; and its gradient for `student` or None."""
    total, gradients = 0.0, []
    for s, t in zip(student.split(PIECE), teacher.split(PIECE), strict=True):
        log_q, log_p = log_probabilities(s, head), log_probabilities(t, head)
        total += kl_of_logs(log_p, log_q, gradient)
        if gradient:
            gradients.append(_times(log_q, head))
    return total, torch.cat(gradients) if gradient else None


def log_probabilities(hidden: torch.Tensor, head: torch.Tensor) -> Pieces:
    """Of every token of the vocabulary after hidden [n, d], n no more than PIECE."""
    pieces, log_z = [], []
    for rows in head.split(_piece(head)):
        pieces.append((hidden @ rows.T).float())
        log_z.append(pieces[-1].logsumexp(dim=1))
    log_z = torch.stack(log_z).logsumexp(dim=0)[:, None]
    for logits in pieces:
        logits.sub_(log_z)
    return pieces


def kl_of_logs(log_p: Pieces, log_q: Pieces, gradient: bool) -> float:
    """Sum over tokens of KL(p ‖ q) from what `log_probabilities` gives; with `gradient`, q − p takes log_q's place."""
    total = 0.0
    for of_p, of_q in zip(log_p, log_q, strict=True):
        p = of_p.exp()
        total += torch.dot(p.flatten(), (of_p - of_q).flatten()).item()
        if gradient:
            of_q.exp_().sub_(p)
    return total


def _piece(head: torch.Tensor) -> int:
    return VOCABULARY_PIECE if head.device.type == "cpu" else len(head)


def _times(pieces: Pieces, head: torch.Tensor) -> torch.Tensor:
    """The product of [n, vocabulary] in pieces with head [vocabulary, d], in the head's dtype."""
    total = 0
    for piece, rows in zip(pieces, head.split(_piece(head)), strict=True):
        total += (piece.to(head.dtype) @ rows).float()
    return total.to(head.dtype)
