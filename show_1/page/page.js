// What the page does in the browser itself. The address says which job it shows: ?job=…

const show1 = {
    working: new Set(),  // the jobs that the page last saw waiting or at work

    job: () => new URLSearchParams(location.search).get('job') || '',

    // The browser's secret, by which its jobs are its own. Read each time: tabs that are opened together have to agree.
    visitor() {
        const drawn = () => btoa(String.fromCharCode(...crypto.getRandomValues(new Uint8Array(24))));
        try {
            if (!localStorage.show1Visitor) localStorage.show1Visitor = drawn();
            return localStorage.show1Visitor;
        } catch {
            return show1.secret ||= drawn();  // nothing may be kept here: then for as long as the page is open
        }
    },

    // Shows a job. `enters` where the page was opened without one: then the way back leads out of the page.
    goTo(job, enters) {
        if (job) {
            const url = new URL(location), narrow = innerWidth <= 640;
            url.searchParams.set('job', job);
            if (job !== show1.job()) history[enters ? 'replaceState' : 'pushState'](null, '', url);
            if (narrow && !enters) document.activeElement.blur();  // the keyboard would cover half of it
            document.querySelector('#job').scrollIntoView({ block: narrow ? 'start' : 'nearest' });
            document.querySelectorAll('[data-testid=toast-close]').forEach(close => close.click());  // of what is over
        }
        show1.look();
    },

    // Looks at the job again and again. The server answers when there is news, or after a pause.
    async begin(server) {
        const begun = show1.server;
        show1.server = server;
        for (let missed = 0; !begun;) {
            missed = await show1.look(show1.news) ? 0 : missed + 1;
            if (!missed && !show1.filled) show1.fillIn();
            show1.tellAway(missed > 1);
            if (missed > 1 && await show1.loggedOut()) location.reload();  // to where one logs in
            if (missed) await new Promise(done => setTimeout(done, 1000));
        }
    },

    // What was typed survives a reload: Gradio reloads by itself where a button was pressed while the server was away.
    boxes() {
        const boxes = document.querySelectorAll('#form :is(textarea, input[type=text], input[type=radio])');
        const name = box => box.type === 'radio' ? `preset ${box.value}` : box.labels[0]?.textContent.trim();
        return Object.fromEntries([...boxes].map(box => [name(box), box]));
    },

    keep() {
        if (!show1.filled) return;  // what is kept is not in the form yet
        const value = box => box.type === 'radio' ? box.checked : box.value;
        const typed = Object.entries(show1.boxes()).map(([name, box]) => [name, value(box)]);
        try {
            sessionStorage.show1Form = JSON.stringify(typed.filter(([, value]) => value));
        } catch {}  // nothing may be kept here
    },

    async fillIn() {
        show1.filled = true;
        let typed = [];
        try {
            typed = JSON.parse(sessionStorage.show1Form || '[]');
            delete sessionStorage.show1Form;
        } catch {}
        const fill = () => {
            const boxes = show1.boxes();
            for (const [name, value] of typed) {
                const box = boxes[name];
                if (box?.type === 'radio' && !box.checked) box.click();
                if (!box || box.type === 'radio' || box.value) continue;
                box.value = value;
                box.dispatchEvent(new Event('input', { bubbles: true }));
            }
            return typed.some(([name]) => !boxes[name]);
        };
        if (!fill()) return;
        document.querySelector('#form .label-wrap').click();  // those under Advanced are drawn only once it is open
        for (let tries = 0; tries < 40 && fill(); tries++) await new Promise(done => setTimeout(done, 50));
    },

    // One look, past Gradio's events: the status of their outputs would cost more than all else here (measured).
    // A part bears the mark of what it shows, so that only what is another has to be sent.
    async look(news) {
        const job = show1.job(), shown = [...document.querySelectorAll('[data-mark]')];
        const marks = Object.fromEntries(shown.map(({ id, dataset }) => [id, dataset.mark]));
        try {
            const told = await Promise.race([
                show1.server.look({ job, visitor: show1.visitor(), news: news || [], marks }),
                new Promise((_, late) => setTimeout(late, 20000)),  // a server may hang
            ]);
            if (job !== show1.job()) return true;  // the page has gone on meanwhile
            show1.news = told.news;
            const focused = document.activeElement;
            for (const [part, [mark, content]] of Object.entries(told.parts)) {
                const place = document.getElementById(part);
                if (typeof content === 'boolean') place.toggleAttribute('data-shown', content);
                else show1.become(place.querySelector('.part'), show1.parsed(`<div class="part">${content}</div>`));
                place.dataset.mark = mark;
            }
            // Who works by keyboard goes on at the status where the button that had the focus is gone.
            if (focused !== document.body && focused?.checkVisibility?.({ visibilityProperty: true }) === false)
                document.querySelector('#status .status')?.focus({ preventScroll: true });
            show1.tell();
            show1.describe();
            return true;
        } catch {
            return false;
        }
    },

    parsed(html) {
        const template = document.createElement('template');  // lighter than a document
        template.innerHTML = html;
        return template.content.firstChild;
    },

    // Makes a node what another is, in place: what stays plays on, keeps the focus, and is not read out again.
    // What the browser or this page has added stays, too: details that were opened, a video under the pointer.
    become(node, other) {
        if (node.nodeValue !== other.nodeValue) node.nodeValue = other.nodeValue;
        for (const { name } of [...node.attributes || []])
            if (name !== 'open' && !other.hasAttribute(name)) node.removeAttribute(name);
        for (const { name, value } of other.attributes || [])
            if (node.getAttribute(name) !== value) node.setAttribute(name, value);
        const old = [...node.childNodes];
        for (const child of [...other.childNodes]) {
            const same = old.findIndex(({ nodeName, id }) => nodeName === child.nodeName && id === child.id);
            old.splice(0, same).forEach(gone => gone.remove());
            if (same < 0) node.insertBefore(child, old[0] || null);
            else show1.become(old.shift(), child);
        }
        old.filter(({ added }) => !added).forEach(gone => gone.remove());
    },

    async askToNotify() {
        const allowed = await window.Notification?.requestPermission() === 'granted';
        if (!allowed || !show1.notify('This is how it will look.'))
            alert('This browser shows no notifications here; the tab will tell.');
    },

    // Whether the browser shows it: Chrome on Android has notifications, but not for pages. One with a tag takes the
    // place of another tab's.
    notify(body, tag) {
        try {
            return Boolean(new Notification('Show-1', { body, tag }));
        } catch {
            return false;
        }
    },

    // The tab's title, of the job that is shown; and the browser's own notice where it is allowed, of all of this
    // browser's jobs that the page saw waiting or at work.
    tell() {
        const status = document.querySelector('#status .status');
        if (!status) return;
        const { state, title } = status.dataset;
        if (title !== show1.title || document.title !== show1.titleThen) {  // the browser may change a title that is set
            document.title = show1.title = title;
            show1.titleThen = document.title;
        }
        const shown = show1.job(), others = [...document.querySelectorAll('#gallery li')].filter(({ id }) => id !== shown);
        const text = status.querySelector('[role=status]').textContent + '\n' + title;
        const jobs = [{ id: shown, state, text }, ...others.map(({ id, dataset }) => ({ id, ...dataset }))];
        const before = show1.working, allowed = window.Notification?.permission === 'granted';
        show1.working = new Set(jobs.filter(({ state }) => ['running', 'waiting'].includes(state)).map(({ id }) => id));
        for (const { id, state, text } of jobs)
            if (allowed && before.has(id) && ['done', 'stopped', 'failed'].includes(state)) show1.notify(text, id);
    },

    // Logins end with the server that they were for.
    loggedOut: () => fetch('config', { signal: AbortSignal.timeout(5000) })
        .then(({ status }) => status === 401, () => false),

    tellAway(away) {
        const place = document.querySelector('#away .part');
        if (away !== Boolean(place.textContent))
            place.innerHTML = away ? '<p class="notice" role="alert">The server does not answer. This page goes on '
                + 'asking, and shows how things are once it is back.</p>' : '';
    },

    // What Gradio does not tell screen readers (6.31).
    describe() {
        for (const head of document.querySelectorAll('.label-wrap')) {
            head.ariaExpanded = head.nextElementSibling.style.display !== 'none';
            head.querySelector('.icon').ariaHidden = 'true';
        }
        document.querySelector('#preset')?.setAttribute('aria-label', 'Preset');
        document.querySelector('#told')?.setAttribute('aria-live', 'polite');
        for (const box of document.querySelectorAll('#form :is(textarea, input[type=text])')) box.dir = 'auto';
    },

    // Puts a file where settings are read from it, and unfolds that, which is drawn only once it has been open.
    async restore(file) {
        const place = document.querySelector('#restore'), given = new DataTransfer();
        given.items.add(file);
        if (!place.querySelector('#drop')?.checkVisibility()) place.querySelector('.label-wrap').click();
        let input;
        while (!(input = place.querySelector('#drop input[type=file]')))
            await new Promise(done => setTimeout(done, 50));
        input.files = given.files;
        input.dispatchEvent(new Event('change', { bubbles: true }));
    },

    copy(button) {
        const text = button.parentElement.querySelector('pre');
        getSelection().selectAllChildren(text);
        const copied = navigator.clipboard?.writeText(text.textContent) 
            ?? (document.execCommand('copy') ? Promise.resolve() : Promise.reject());
        copied.then(() => { button.textContent = 'Copied'; }, () => { button.textContent = 'Press Ctrl+C'; });
    },

    type(prompt) {
        const box = document.querySelector('#prompt textarea');
        box.value = prompt;
        box.dispatchEvent(new Event('input', { bubbles: true }));
        box.focus();
    },
};

document.addEventListener('click', event => {
    const { target } = event;
    const example = target.closest('[data-prompt]'), copy = target.closest('[data-copy]');
    const link = target.closest('#gallery a');
    if (example) show1.type(example.dataset.prompt);
    if (copy) show1.copy(copy);
    if (link && !event.ctrlKey && !event.metaKey && !event.shiftKey) {  // into view without a new page
        event.preventDefault();
        show1.goTo(new URL(link.href).searchParams.get('job'));
    }
});
document.addEventListener('click', () => setTimeout(show1.describe));
document.addEventListener('click', event => {  // the second of a double click would ask for a second video
    if (event.detail > 1 && event.target.closest('button.primary, #ended button')) event.stopImmediatePropagation();
}, true);
document.addEventListener('keydown', event => {  // and an Enter that is held down, for many
    if (event.repeat && event.key === 'Enter' && !event.shiftKey && event.target.closest('#form')) event.preventDefault();
}, true);
addEventListener('popstate', () => show1.look());
addEventListener('pagehide', show1.keep);
// What could not be loaded, as while the server was away, is tried again.
document.addEventListener('error', ({ target }) => {
    const src = target.closest?.('#screen, #clips, #gallery') && target.getAttribute('src');
    if (src) setTimeout(() => { if (target.getAttribute('src') === src) target.setAttribute('src', src); }, 10000);
}, true);
// A video may be dropped anywhere: the browser would leave the page for it.
document.addEventListener('dragover', event => {
    if (event.dataTransfer.types.includes('Files')) event.preventDefault();
});
document.addEventListener('drop', event => {
    const [file] = event.dataTransfer.files;
    if (!file) return;
    event.preventDefault();  // what Gradio takes, it keeps to itself
    show1.restore(file);
});
// Clips and the gallery's videos play while they are pointed at.
document.addEventListener('mouseover', event => {
    event.target.closest?.('.clips video')?.play().catch(() => {});  // left again before it played
    const picture = event.target.closest?.('img[data-video]');
    if (!picture || matchMedia('(hover: none), (prefers-reduced-motion: reduce)').matches) return;
    const video = Object.assign(document.createElement('video'), {
        src: picture.dataset.video, muted: true, loop: true, autoplay: true, playsInline: true, added: true,
    });
    video.ariaHidden = 'true';
    picture.closest('.thumb').append(video);
});
document.addEventListener('mouseout', event => {
    event.target.closest?.('.clips video')?.pause();
    const thumb = event.target.closest?.('#gallery .thumb');
    if (thumb && !thumb.contains(event.relatedTarget)) thumb.querySelector('video')?.remove();
});
