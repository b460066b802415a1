// Folds: a link to something in one opens it, and on paper all are open.
(() => {
  const reveal = () => {
    const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
    const fold = target?.closest("details.samlib-fold");
    if (!fold) return;
    fold.open = true;
    target.scrollIntoView();
  };
  let closed = [];
  addEventListener("DOMContentLoaded", reveal);
  addEventListener("hashchange", reveal);
  addEventListener("beforeprint", () => {
    closed = [...document.querySelectorAll("details.samlib-fold:not([open])")];
    closed.forEach(fold => (fold.open = true));
  });
  addEventListener("afterprint", () => closed.forEach(fold => (fold.open = false)));
})();
