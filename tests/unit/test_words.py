"""Parts of sentences, each as its readers see it."""

from dmpctl.words import differences, nearest, nearest_or, plus_minus


def test_the_nearest_word_whatever_its_case_and_signs():
    assert nearest("itres", ["iters", "seed"]) == "iters"
    assert nearest("zzz", ["iters", "seed"]) is None
    assert nearest("DDIM", ["ddpm", "ddim"]) == "ddim"
    assert nearest("dmpplus", ["dmp", "dmp+"]) == "dmp+"
    assert nearest("batch-sise", ["batch_size"]) == "batch_size"


def test_of_several_near_words_one_that_begins_alike_is_meant():
    assert nearest("--sed", ["--used", "--seed"]) == "--seed"
    assert nearest("bed", ["fbed", "bead"]) == "bead"


def test_the_nearest_word_is_a_hint():
    assert nearest_or("digit", ["digits", "photos"], "name one") == "did you mean digits?"
    assert nearest_or("zzz", ["digits", "photos"], "name one") == "name one"
    assert nearest_or("dig", ["digitalia"], "name one") == "name one"
    assert nearest_or("dig", ["digitalia"], "name one", cutoff=0.5) == "did you mean digitalia?"


def test_differences_name_each_key_once_with_both_values():
    before, now = {"a": 1, "b": 2, "gone": 3, "same": None}, {"b": 5, "a": 1, "new": 4}
    assert differences(before, now) == [("b", 2, 5), ("gone", 3, None), ("new", None, 4)]


def test_an_error_stands_behind_its_value():
    assert f"{1.5}{plus_minus(0.01234567)}" == "1.5 ± 0.01235"
    assert plus_minus(0.01234567, ".2f") == " ± 0.01"
    assert plus_minus(None) == ""
