"""`--as_published`: follow the published code where this package makes other choices.

Use it to compare with results of princeton-nlp/MeZO. docs/paper.md lists every difference and says
which of them this option removes: OPT's first token, how demonstrations are drawn and cut, where
calibration stands, and how the best weights are selected.
"""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mezo.errors import InputError
from mezo.objectives import Causal, Form
from mezo.runs.arguments import BEST, TrainArguments

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OPT_FIRST = "<s>"  # OPT was trained with </s> in front of texts, as its tokenizer puts it


def set_first_token(tokenizer: "PreTrainedTokenizerBase", model: Any) -> None:
    """Put <s> before every text of an OPT model, as the published code does; others keep theirs.

    Changes the tokenizer in place. Raises InputError for an OPT whose tokenizer has no such token.
    """
    from tokenizers.processors import TemplateProcessing

    if getattr(model.config, "model_type", None) != "opt":
        return
    token = tokenizer.convert_tokens_to_ids(OPT_FIRST)
    if token is None or token == tokenizer.unk_token_id:
        raise InputError(f"as_published: the tokenizer has no token {OPT_FIRST}")
    inner: Any = tokenizer
    inner.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{OPT_FIRST} $A", special_tokens=[(OPT_FIRST, token)]
    )


def cut_by_tokens(form: Form) -> Form:
    """Return the form that cuts what is too long on the left, through demonstrations too."""
    cut = replace(form, truncate=True)
    return replace(cut, whole=False) if isinstance(cut, Causal) else cut


def best_by_loss(args: TrainArguments, form: Form) -> TrainArguments:
    """Return the arguments with the dev loss choosing the best weights of a causal model.

    The published code for OPT leaves the choice to the Trainer's default, which is the loss. What
    was asked for by hand stays.
    """
    if isinstance(form, Causal) and args.metric_for_best_model == BEST:
        return replace(args, metric_for_best_model="loss", greater_is_better=False)
    return args
