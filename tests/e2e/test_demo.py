"""The one command that shows the main job on a bare machine."""
from world import marked


def test_the_demo_runs_shows_a_table_and_leaves_nothing(world):
    result = world.run("demo", timeout=120)
    assert result.code == 0, result.out
    assert "supernode" in result.stdout and "Traceback" not in result.out
    assert not marked(world.mark), "the demo left processes behind"
