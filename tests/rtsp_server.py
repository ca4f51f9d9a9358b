"""A camera for test_rtsp.py: an RTSP server on loopback, run by Debian's Python, which has GStreamer's.

rtsp_server.py PORT WIDTH HEIGHT PATTERN: `videotestsrc pattern=PATTERN` at 25 frames/s as H.264; user `line`,
password `s3cret`. Prints "ready" when it accepts clients. A line on stdin is the number of a new pattern.
"""

import sys
import threading

import gi

gi.require_version("GstRtspServer", "1.0")
gi.require_version("Gst", "1.0")
from gi.repository import GLib, Gst, GstRtspServer  # noqa: E402 (their versions are chosen before)

port, width, height, pattern = sys.argv[1:]
Gst.init(None)
server = GstRtspServer.RTSPServer(address="127.0.0.1", service=port)
auth = GstRtspServer.RTSPAuth()
token = GstRtspServer.RTSPToken()
token.set_string("media.factory.role", "user")
auth.add_basic(GstRtspServer.RTSPAuth.make_basic("line", "s3cret"), token)
server.set_auth(auth)
factory = GstRtspServer.RTSPMediaFactory(shared=True)
permissions = GstRtspServer.RTSPPermissions()
for permission in ("media.factory.access", "media.factory.construct"):
    permissions.add_permission_for_role("user", permission, True)
factory.set_permissions(permissions)
factory.set_launch(
    f"( videotestsrc name=picture is-live=true pattern={pattern} "
    f"! video/x-raw,width={width},height={height},framerate=25/1,format=I420 "
    "! x264enc tune=zerolatency speed-preset=ultrafast key-int-max=25 ! rtph264pay name=pay0 config-interval=1 )"
)
server.get_mount_points().add_factory("/cam", factory)
server.attach(None)


def take_patterns(factory, media):
    def work():
        for line in sys.stdin:
            media.get_element().get_by_name("picture").set_property("pattern", int(line))

    threading.Thread(target=work, daemon=True).start()


factory.connect("media-configure", take_patterns)
print("ready", flush=True)
GLib.MainLoop().run()
