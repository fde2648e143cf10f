"""Object stores on this machine: moto for s3://, gcp-storage-emulator for gs://, each with one empty bucket.

    python -m tests.training.object_stores 9101

starts that for gs:// at a port and prints the environment that leads there.
"""

import contextlib
import http.server
import re
import sys
import threading
import urllib.parse
from collections.abc import Iterator
from functools import partial

BUCKET = "bucket"


@contextlib.contextmanager
def started(kind: str, port: int = 0) -> Iterator[dict[str, str]]:
    """The environment variables that lead to a store of the kind "gs" or "s3"."""
    with {"gs": _gs, "s3": _s3}[kind](port) as environment:
        yield environment


@contextlib.contextmanager
def _s3(port: int) -> Iterator[dict[str, str]]:
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", port=port, verbose=False)
    server.start()
    try:
        address = "http://{}:{}".format(*server.get_host_and_port())
        key = {"aws_access_key_id": "x", "aws_secret_access_key": "x"}
        boto3.client("s3", endpoint_url=address, region_name="us-east-1", **key).create_bucket(Bucket=BUCKET)
        yield {name.upper(): value for name, value in key.items()} | {
            "AWS_ENDPOINT_URL": address,
            "AWS_DEFAULT_REGION": "us-east-1",
        }
    finally:
        server.stop()


@contextlib.contextmanager
def _gs(port: int) -> Iterator[dict[str, str]]:
    from gcp_storage_emulator import server as emulator
    from gcp_storage_emulator.handlers import buckets
    from gcp_storage_emulator.storage import Storage

    class Refused(Exception):
        """There is another generation than the one that a request is for."""

    class Conditional(Storage):
        """Heeds `ifGenerationMatch`, as the store itself does and the emulator does not. Orbax's writes depend on it, and on
        being told the generation of what is read."""

        generation: str | None = None  # 0: there is to be no such object

        def create_file(self, bucket_name, file_name, *arguments, **options):
            self._check(bucket_name, file_name)
            return super().create_file(bucket_name, file_name, *arguments, **options)

        def delete_file(self, bucket_name, file_name):
            self._check(bucket_name, file_name)
            return super().delete_file(bucket_name, file_name)

        def _write_config_to_file(self):
            """It would write all that is there with every request."""

        def _check(self, bucket_name, file_name):
            if self.generation not in (None, self.generation_of(bucket_name, file_name)):
                raise Refused

        def generation_of(self, bucket_name, file_name):
            return self.objects.get(bucket_name, {}).get(file_name, {"generation": "0"})["generation"]

    class Handler(emulator.RequestHandler):
        turn = threading.Lock()  # the emulator has one thread; here each connection has one, and they take turns

        def _do(self, method):
            address = urllib.parse.urlparse(self.path)
            self.place, query = re.search(r"/b/([^/]+)/o/(.+)", address.path), urllib.parse.parse_qs(address.query)
            with self.turn:
                self.storage.generation = query.get("ifGenerationMatch", [None])[0]
                try:
                    emulator.Router(self).handle(method)
                except Refused:
                    self.send_error(412)

        do_GET = lambda self: self._do("GET")
        do_POST = lambda self: self._do("POST")
        do_PUT = lambda self: self._do("PUT")
        do_PATCH = lambda self: self._do("PATCH")
        do_DELETE = lambda self: self._do("DELETE")

        def end_headers(self):
            if self.command == "GET" and self.place:
                bucket, name = map(urllib.parse.unquote, self.place.groups())
                self.send_header("x-goog-generation", self.storage.generation_of(bucket, name))
            super().end_headers()

        def log_message(self, format, *arguments):
            pass

    storage = Conditional(use_memory_fs=True)
    buckets.create_bucket(BUCKET, storage)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", port), partial(Handler, storage))
    server.handle_error = lambda *_: None  # clients hang up on what they need no more
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        address = f"http://127.0.0.1:{server.server_port}"
        yield {
            "STORAGE_EMULATOR_HOST": address,  # gcsfs and google-cloud-storage
            "TENSORSTORE_GCS_HTTP_URL": address,  # Orbax
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "x",
            "GOOGLE_CLOUD_PROJECT": "project",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # which asks another server what kind the bucket is of
        }
    finally:
        server.shutdown()
        server.server_close()


if __name__ == "__main__":
    with started("gs", int(sys.argv[1])) as found:
        print("\n".join(f"export {name}={value}" for name, value in found.items()), flush=True)
        threading.Event().wait()
