"""Rated sentences of film reviews from the source archive of vaderSentiment."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa

from benchmark.studies.builders.common import checked, stratified, write_parquet, write_split
from quanttune.errors import AssetError

REVIEWS_VALIDATION, REVIEWS_TEST = 1_000, 2_000
VADER_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
VADER_INNER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
VADER_MEMBER = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"


def read_reviews(archive: Path) -> list[tuple[int, float, str]]:
    """Read ``(id, mean rating, sentence)`` of every review snippet from the vaderSentiment source archive."""
    with tarfile.open(checked(archive, VADER_SHA256)) as outer:
        inner = outer.extractfile(VADER_INNER)
        if inner is None:
            raise AssetError(f"{archive} has no member {VADER_INNER}; get the original file again")
        with tarfile.open(fileobj=io.BytesIO(inner.read())) as nested:
            member = nested.extractfile(VADER_MEMBER)
            if member is None:
                raise AssetError(f"{VADER_INNER} has no member {VADER_MEMBER}; get the original file again")
            lines = member.read().decode("utf-8").split("\r\n")
    fields = [line.split("\t") for line in lines if line]
    return [(int(number), float(rating), sentence) for number, rating, sentence in fields]


def build_movie_reviews(archive: Path, target: Path) -> dict[str, Any]:
    """Write all 10,605 review sentences and their split by polarity, the sign of the mean rating.

    Sentences rated exactly 0 have no polarity and stay out of the split, as do repeats of a sentence, which
    could otherwise stand in two parts of it. Ids are listed by number of words, so that consecutive batches
    need little padding; a part of a split is therefore taken evenly spaced, never from its front.
    """
    rows = read_reviews(archive)
    first: dict[str, int] = {}
    for item, _, sentence in rows:
        first.setdefault(sentence, item)
    repeats = [item for item, _, sentence in rows if first[sentence] != item]
    neutral = [item for item, rating, _ in rows if rating == 0 and item not in repeats]
    pool = {item: int(rating > 0) for item, rating, _ in rows if item not in {*repeats, *neutral}}
    words = {item: len(sentence.split()) for item, _, sentence in rows}

    test = stratified(pool, REVIEWS_TEST, "movie_reviews", "test")
    rest = {item: label for item, label in pool.items() if item not in set(test)}
    validation = stratified(rest, REVIEWS_VALIDATION, "movie_reviews", "validation")
    train = set(rest) - set(validation)

    def by_length(ids: Iterable[int]) -> list[int]:
        return sorted(ids, key=lambda item: (words[item], item))

    table = pa.table(
        {
            "id": pa.array([item for item, _, _ in rows], pa.int32()),
            "rating": pa.array([rating for _, rating, _ in rows], pa.float64()),
            "text": pa.array([sentence for _, _, sentence in rows], pa.string()),
        }
    )
    split = {
        "ids": {"train": by_length(train), "validation": by_length(validation), "test": by_length(test)},
        "excluded": {"rated exactly 0": neutral, "repeats an earlier sentence": repeats},
    }
    return {
        "title": "Sentences of film reviews, each with the mean of 20 human sentiment ratings",
        "origin": f"vaderSentiment 3.3.2 source archive, {VADER_INNER.partition('/')[2]}, {VADER_MEMBER}",
        "licence": "MIT, copyright 2016 C.J. Hutto",
        "citation": "Hutto and Gilbert 2014, VADER, ICWSM-14; sentences: Pang and Lee 2005",
        "columns": {
            "id": "number of the sentence in the original file, from 1",
            "rating": "mean rating, -4 (very negative) to 4 (very positive); its sign is the polarity",
            "text": "the sentence as in the original file",
        },
        "sources": [{"file": "vaderSentiment-3.3.2.tar.gz", "sha256": VADER_SHA256}],
        "files": [write_parquet(target / "movie_reviews.parquet", table)],
        "split": write_split(target / "splits" / "movie_reviews.json", split),
    }
