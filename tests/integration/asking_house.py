"""An API with a tool that asks: ``mine``, whose calls are noted in ``house.made``."""

from contextlib import contextmanager

from fastapi.testclient import TestClient

from agent.tools.tool import Tool
from tests.integration.test_access import House

PARAMETERS = {"type": "object", "properties": {"n": {"type": "integer"}}}


@contextmanager
def asking_house(database, tmp_path):
    house = House(database, tmp_path, tool_levels={"mine": "ask"}, self_evaluation=False, max_model_tokens=4096)
    made = house.made = []

    async def run(caller, arguments):
        made.append(arguments["n"])
        return f"the result of {arguments['n']}"

    with TestClient(house.app, raise_server_exceptions=False) as house.inside:
        house.app.state.toolbox.own["mine"] = Tool("mine", "Does it.", PARAMETERS, run)
        yield house
