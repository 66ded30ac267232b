"""Tasks of lm-evaluation-harness over the demo pair's toy task, and a plain client to compare its figures with."""

import json
import os
import random
import urllib.request

import lm_eval
from lm_eval.tasks import TaskManager

SERVER = os.environ["OVERFILL_URL"].removesuffix("/v1")

NAMES = ["kim", "ana", "ben", "lou", "max", "eva", "tom", "ida", "leo", "mia", "jan", "zoe"]
JOBS = ["nurse", "baker", "pilot", "judge", "tailor", "miner", "clerk", "farmer"]
PETS = ["mice", "dog", "cat", "parrot", "snake", "rabbit", "goat", "horse"]
TOWNS = {"molde": "norway", "turin": "italy", "kyoto": "japan", "lima": "peru", "accra": "ghana", "laval": "canada"}
COUNTRIES = list(TOWNS.values())
QUESTION = "what country is everyone from ?"


def documents(count):
    """Records of three people and a question about their countries. `choices` has one right and three wrong answers."""
    draw = random.Random(1)
    for _ in range(count):
        people = list(zip(draw.sample(NAMES, 3), draw.sample(list(TOWNS), 3), draw.sample(JOBS, 3), draw.sample(PETS, 3)))
        records = [f"{name} : {town} , {job} , {pet} , {draw.randint(1, 20)} ." for name, town, job, pet in people]
        right = [TOWNS[town] for _, town, _, _ in people]
        lists = [right]
        while len(lists) < 4:
            wrong = list(right)
            wrong[draw.randrange(3)] = draw.choice(COUNTRIES)
            if wrong not in lists:
                lists.append(wrong)
        draw.shuffle(lists)
        answers = [" , ".join(f"{name} {country}" for (name, *_), country in zip(people, each)) + " ." for each in lists]
        yield {"context": " ".join([*records, QUESTION]), "choices": answers, "right": lists.index(right)}


def write(folder, docs):
    """Writes the documents. Returns two tasks over them: to choose an answer, and to write it."""
    file = folder / "documents.jsonl"
    file.write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    common = {
        "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(file)}, "cache_dir": str(folder / "cache")},
        "test_split": "test", "doc_to_text": "{{context}}",
    }
    choose = {
        **common, "task": "choose", "output_type": "multiple_choice", "doc_to_choice": "{{choices}}", "doc_to_target": "right",
        "metric_list": [{"metric": "acc"}],
    }
    write = {
        **common, "task": "write", "output_type": "generate_until", "doc_to_target": "{{choices[right]}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 60},
        "filter_list": [{"name": "stripped", "filter": [{"function": "regex", "regex_pattern": "^\\s*(.*?)\\s*$"}, {"function": "take_first"}]}],
        "metric_list": [{"metric": "exact_match"}],
    }
    return [choose, write]


def evaluate(model, path, arguments, tasks, **options):
    """Runs the harness. Returns figures by task, and samples by task in the order of the documents."""
    results = lm_eval.simple_evaluate(
        model=model, model_args={"base_url": SERVER + path, "max_retries": 1, **arguments}, tasks=tasks,
        task_manager=TaskManager(include_defaults=False), bootstrap_iters=0, **options,
    )
    samples = {name: sorted(each, key=lambda sample: sample["doc_id"]) for name, each in results["samples"].items()}
    return results["results"], samples


def post(path, body):
    request = urllib.request.Request(SERVER + path, json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)
