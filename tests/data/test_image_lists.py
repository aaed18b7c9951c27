import pytest

from wfnet.data.image_lists import ImageList

K = 7


def test_a_list_is_drawn_by_seed_and_fits_its_data_alone(tmp_path, make_dataset):
    dataset = make_dataset(list(range(K)) * 4)
    images = ImageList.draw(dataset, 2, seed=1, part="test")
    assert len(images.positions(dataset)) == 2 * K
    assert dataset.labels[images.positions(dataset)].bincount().tolist() == [2] * K
    assert images != ImageList.draw(dataset, 2, seed=2, part="test")
    rest = images.others(dataset)
    assert len(rest) == 2 * K
    assert not set(rest.tolist()) & set(images.positions(dataset).tolist())
    images.save(tmp_path / "list.json")
    assert ImageList.load(tmp_path / "list.json") == images
    with pytest.raises(ValueError, match="does not fit these data"):
        images.positions(make_dataset([0] * (4 * K)))
    (tmp_path / "list.json").write_text('{"format": 1}')
    with pytest.raises(ValueError, match="not a list of images"):
        ImageList.load(tmp_path / "list.json")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        ImageList.load(tmp_path / "none.json")
