from collections import Counter

from dmpctl.data.bundled import Digits
from dmpctl.images.captions import Captioned, drawn
from tests.unit.data.made import encoded, folder_images, write_folder


def test_a_caption_is_a_function_of_seed_epoch_and_index():
    found = [drawn(5, 0, epoch, 7) for epoch in range(50)]
    assert found == [drawn(5, 0, epoch, 7) for epoch in range(50)]
    assert found != [drawn(5, 1, epoch, 7) for epoch in range(50)]
    assert found != [drawn(5, 0, epoch, 8) for epoch in range(50)]


def test_each_is_drawn_as_often_as_the_others():
    times = Counter(drawn(5, 0, epoch, index) for epoch in range(50) for index in range(100))
    chi2 = sum((times[caption] - 1000) ** 2 / 1000 for caption in range(5))
    assert chi2 < 18.5  # 4 degrees of freedom, p = 0.001


def test_one_of_one():
    assert drawn(1, 3, 4, 5) == 0


def test_sources_say_whether_they_may_have_captions(tmp_path):
    source = folder_images(write_folder(tmp_path, {"a.png": encoded(0)}))
    assert isinstance(source, Captioned)
    assert source.captions(0) == ()
    assert not isinstance(Digits(), Captioned)
