"""Scores of candidates, which give both the loss that is trained and the metric.

    causal    score = mean log-probability of the candidate's tokens after the prompt
    generated the same for the right answer alone; at evaluation the model writes
    masked    score = logit of the candidate's one token at the mask
    encoder   score = 20 cos(embedding of the text, embedding of the candidate's description)

scores has shape (examples, candidates), in float32 whatever the weights' dtype. The loss is the
cross-entropy over candidates, and the prediction is the candidate with the highest score.

    form = form_for(model, tokenizer, task)
    batch = form.collate([form.encode(example) for example in examples])
    loss = form.loss(model, batch)             # a closure for MeZO: lambda: form.loss(model, batch)

Logits, the largest tensor of a forward pass, are computed only where they are read.
"""

from mezo.models.modes import Batch
from mezo.objectives.causal import Causal
from mezo.objectives.encoder import Encoder
from mezo.objectives.form import Feature, Form
from mezo.objectives.form_for import form_for
from mezo.objectives.generated import Generated
from mezo.objectives.masked import Masked

__all__ = ["Batch", "Causal", "Encoder", "Feature", "Form", "Generated", "Masked", "form_for"]
