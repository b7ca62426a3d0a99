/* The search runs in a web worker, which browsers refuse on pages opened from a disk (file://).
   There, and only there, run the worker's script in a hidden iframe instead. */
if (location.protocol === "file:") {
  window.IFrameWorker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      document.body.append(frame);
      const scope = frame.contentWindow;
      // A worker's postMessage goes to its owner; an iframe's has to be pointed there.
      scope.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
      scope.importScripts = (...scripts) =>
        scripts.reduce((previous, src) => previous.then(() => load(scope.document, src)), Promise.resolve());
      this.scope = scope;
      this.ready = load(scope.document, url);
    }
    postMessage(data) {
      const event = () => this.scope.dispatchEvent(new this.scope.MessageEvent("message", { data }));
      this.ready.then(event);
    }
    terminate() {}
  };
  window.Worker = window.IFrameWorker;

  function load(page, src) {
    return new Promise((resolve, reject) => {
      const script = page.createElement("script");
      script.src = new URL(src, location.href);
      script.onload = resolve;
      script.onerror = reject;
      (page.body || page.documentElement).append(script);
    });
  }
}
