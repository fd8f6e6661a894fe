"""Headless Chromium, for pages that people will look at."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any


class Browser:
    """A browser with a profile of its own; call it with a script to run in the open page."""

    def __init__(self, profile: Path) -> None:
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service

        browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
        assert browser, "install Chromium and its driver (Debian: apt-get install chromium chromium-driver)"
        assert driver, "install Chromium's driver (Debian: apt-get install chromium-driver)"
        options = webdriver.ChromeOptions()
        options.binary_location = browser
        for flag in (
            "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
            "--disable-component-update", "--disable-sync", "--disable-quic", f"--user-data-dir={profile}",
        ):  # fmt: skip
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=Service(driver))

    def open(self, page: str, width: int, scheme: str = "light", media: str = "") -> None:
        """Show a page in a window of this width, as someone who prefers a light or a dark scheme, or as printed."""
        screen = {"width": width, "height": 1000, "deviceScaleFactor": 1, "mobile": width < 600}
        preferred = [{"name": "prefers-color-scheme", "value": scheme}]
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": preferred})
        self.driver.get(page)

    def __call__(self, script: str) -> Any:
        return self.driver.execute_script(script)

    def complaints(self) -> list[str]:
        """What the browser has logged that is no mere note."""
        return [e["message"] for e in self.driver.get_log("browser") if e["level"] in ("SEVERE", "WARNING")]
