"""A bucket on this machine, run as a program: `python bucket.py PORT`.

The emulator on PyPI (`gcp-storage-emulator`) implements the JSON API of GCS without
two things that tensorstore needs: a download's response has the object's generation, and a write
may require one.
"""

import sys
from http import HTTPStatus

from gcp_storage_emulator import server
from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import objects

_download, _insert = objects.download, objects.insert


def generation(storage, bucket, name):
    try:
        return storage.get_file_obj(bucket, name)["generation"]
    except NotFound:
        return "0"


def download(request, response, storage, *_, **__):
    now = generation(storage, request.params["bucket_name"], request.params["object_id"])
    if request.query.get("ifGenerationNotMatch") == [now] and now != "0":
        response.status = HTTPStatus.NOT_MODIFIED
        return
    _download(request, response, storage)
    response["x-goog-generation"] = now


def insert(request, response, storage, *_, **__):
    wanted = request.query.get("ifGenerationMatch")
    if wanted and wanted != [
        generation(storage, request.params["bucket_name"], request.query["name"][0])
    ]:
        assert request.data is not None  # Unless the body is read, the connection hangs.
        response.status = HTTPStatus.PRECONDITION_FAILED
        return
    _insert(request, response, storage)


objects.download, objects.insert = download, insert
for _, methods in server.HANDLERS:
    for method, handler in methods.items():
        methods[method] = {_download: download, _insert: insert}.get(handler, handler)

if __name__ == "__main__":
    server.create_server(
        "localhost", int(sys.argv[1]), in_memory=True, default_bucket="bucket"
    ).run()
