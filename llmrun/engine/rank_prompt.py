"""The input of a reranker: a query and a document as one sequence of tokens."""

from __future__ import annotations

import re

from llmrun.engine.embed_types import EmbedFacts
from llmrun.engine.types import Tokenizer

_FIELD = re.compile(r"\{(query|document)\}")


def rank_prompt(tokenizer: Tokenizer, facts: EmbedFacts, query: str, document: str) -> list[int]:
    """The tokens to `rank`: the file's own template where it has one, else
    `BOS query EOS SEP document EOS` with those of the tokens that the vocabulary wants (and `SEP`
    at the end where it wants no EOS): `<s> q </s></s> d </s>` of RoBERTa, `[CLS] q [SEP] d [SEP]`
    of BERT.

    No control token comes of the two texts, whatever they spell.
    """
    if facts.rank_template is not None:
        return _fill_template(tokenizer, facts.rank_template, query, document)
    bos, eos, sep = (
        [] if token is None else [token] for token in (facts.bos, facts.eos, facts.sep)
    )
    first, second = _plain(tokenizer, query), _plain(tokenizer, document)
    return [*bos, *first, *eos, *sep, *second, *(eos or sep)]


def _fill_template(tokenizer: Tokenizer, template: str, query: str, document: str) -> list[int]:
    texts = {"query": query, "document": document}
    parts = _FIELD.split(template)  # text, field, text, field, …, text
    literals = (*tokenizer.special_literals(query), *tokenizer.special_literals(document))
    if not any(literal.is_control for literal in literals):
        # In one piece, so that words merge across the borders as they did in training.
        whole = "".join(texts[part] if i % 2 else part for i, part in enumerate(parts))
        return tokenizer.tokenize(whole, add_special=False, parse_special=True)
    tokens: list[int] = []
    for i, part in enumerate(parts):
        if i % 2:
            tokens += _plain(tokenizer, texts[part])
        else:
            tokens += tokenizer.tokenize(part, add_special=False, parse_special=True)
    return tokens


def _plain(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.tokenize(text, add_special=False, parse_special=False)
