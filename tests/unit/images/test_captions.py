from collections import Counter

from dmpctl.data.bundled import Digits
from dmpctl.images.captions import Captioned, caption_of
from tests.unit.data.made import encoded, folder_images, write_folder

FIVE = ("a", "b", "c", "d", "e")


def test_a_caption_is_a_function_of_seed_epoch_and_index():
    drawn = [caption_of(FIVE, 0, epoch, 7) for epoch in range(50)]
    assert drawn == [caption_of(FIVE, 0, epoch, 7) for epoch in range(50)]
    assert drawn != [caption_of(FIVE, 1, epoch, 7) for epoch in range(50)]
    assert drawn != [caption_of(FIVE, 0, epoch, 8) for epoch in range(50)]


def test_each_is_drawn_as_often_as_the_others():
    drawn = Counter(caption_of(FIVE, 0, epoch, index) for epoch in range(50) for index in range(100))
    chi2 = sum((drawn[caption] - 1000) ** 2 / 1000 for caption in FIVE)
    assert chi2 < 18.5  # 4 degrees of freedom, p = 0.001


def test_one_and_none():
    assert caption_of(("only",), 3, 4, 5) == "only"
    assert caption_of((), 3, 4, 5) == ""


def test_sources_say_whether_they_may_have_captions(tmp_path):
    source = folder_images(write_folder(tmp_path, {"a.png": encoded(0)}))
    assert isinstance(source, Captioned)
    assert source.captions(0) == ()
    assert not isinstance(Digits(), Captioned)
